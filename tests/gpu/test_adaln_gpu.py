"""The Triton kernels of the AdaLN family on a GPU: no further from float64 than eager, and the same bits every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.adaln_cases import OPS, assert_equal_bits, exact, leaves_of, poison_empty_tensors, rms_error, run

from megatron_ext.kernels.adaln import reference

pytestmark = pytest.mark.gpu

# RMS error over RMS value that is never too much. Elementwise results: two units of the last place of fp32, for a few
# roundings in another order. Gradients of rows are sums over up to 4096 tokens, with a running sum over a slab of up to
# about 200 of them: n additions in a row lose about sqrt(n) / 2 units, 7 * 2^-24 < 2^-21, where eager sums in a tree.
FLOOR = 2**-22
ROW_FLOOR = 2**-21
ROW_LEAVES = ("dtable", "dweight", "dbias")


@pytest.fixture(scope="module")
def kernels() -> Any:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from megatron_ext.kernels.adaln import triton

    return triton


def frames_for(tokens: int, width: int) -> tuple[int, int]:
    """(clips, frames): enough to tell them apart, few where float64 would take gigabytes."""
    return (1, 2) if tokens * width > 2**22 else (2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [64, 100, 768, 1536, 5120, 8192])
@pytest.mark.parametrize("tokens", [1, 3, 255, 880, 1024, 4096])
def test_no_worse_than_eager(
    kernels: Any, tokens: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_empty_tensors(monkeypatch, kernels)
    leaves, above = leaves_of((*frames_for(tokens, width), tokens, width), dtype, device="cuda")
    for name in OPS:
        found, eager = run(kernels, name, leaves, above), run(reference, name, leaves, above)
        assert_equal_bits(found, run(kernels, name, leaves, above))
        wanted, wanted_of_eager = exact(name, leaves, above, found), exact(name, leaves, above, eager)
        assert found.keys() == eager.keys() == wanted.keys()
        for key, value in wanted.items():
            assert found[key].dtype == eager[key].dtype
            error, allowed = rms_error(found[key], value), 1.5 * rms_error(eager[key], wanted_of_eager[key])
            floor = ROW_FLOOR if key in ROW_LEAVES else FLOOR
            assert error <= max(allowed, floor), f"{name} {key}: error {error:.3g}, 1.5 times eager's is {allowed:.3g}"


@pytest.mark.parametrize("frames", [1, 21, 98, 300])
def test_many_frames(kernels: Any, frames: int) -> None:
    """Another cut into slabs for every number of frames, one of them for more frames than the GPU has processors."""
    leaves, above = leaves_of((1, frames, 67, 1536), torch.bfloat16, torch.bfloat16, device="cuda")
    for name in OPS:
        found, eager = run(kernels, name, leaves, above), run(reference, name, leaves, above)
        for key, value in exact(name, leaves, above, found).items():
            error = rms_error(found[key], value)
            allowed = 1.5 * rms_error(eager[key], exact(name, leaves, above, eager)[key])
            assert error <= max(allowed, ROW_FLOOR), f"{name} {key}: error {error:.3g}, allowed {allowed:.3g}"


def test_offsets_beyond_two_billion(kernels: Any) -> None:
    """The last frame of a tensor of more than 2^31 values equals the same frame alone."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB of GPU memory")
    frames, tokens, width = 66, 4096, 8192
    x = torch.empty((1, frames, tokens, width), dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    x[:, :-1] = 0
    x[:, -1].normal_()
    rows = torch.randn(1, frames, 3, width, device="cuda")
    rows.requires_grad_()
    last = rows.detach()[:, -1:].requires_grad_()
    (dx, drows), (dx_last, drows_last) = (
        torch.autograd.grad(kernels.adaln(wide, *table.unbind(2)[:2], 1e-6), (wide, table), wide.detach())
        for wide, table in ((x.requires_grad_(), rows), (x.detach()[:, -1:].clone().requires_grad_(), last))
    )
    assert torch.equal(dx[:, -1:], dx_last)
    torch.testing.assert_close(drows[:, -1:], drows_last, rtol=1e-4, atol=1e-3)
