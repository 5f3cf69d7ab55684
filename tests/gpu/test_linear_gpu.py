"""The Triton kernels of linear layers on a GPU: as good as fp32 arithmetic allows, and the same bits every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.adaln_cases import assert_equal_bits, poison_empty_tensors
from helpers.linear_cases import check_results, draw, results, views

pytestmark = pytest.mark.gpu

# Largest relative error of one rounding to nearest. What fp32 arithmetic adds is in `check_results`, and for results in
# bf16 next to nothing.
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8}
# Streams of video and structure through a block, its packed projection and its MLP; and sizes that nothing divides.
SIZES = [(20480, 1536), (20480, 4608), (20480, 8960), (80, 512), (80, 2048)]
ODD_SIZES = [(1, 1), (3, 7), (130, 100), (4097, 1537)]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, whose new tensors hold NaN until they are written."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from megatron_ext.kernels.linear import triton

    poison_empty_tensors(monkeypatch, triton)
    return triton


def pair(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return draw((rows, width), dtype, "cuda"), draw((rows, width), dtype, "cuda", seed=1)


@pytest.mark.parametrize("dtype", UNIT, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "width"), SIZES + ODD_SIZES)
def test_against_float64_twice(kernels: Any, rows: int, width: int, dtype: torch.dtype) -> None:
    hidden, grad = pair(rows, width, dtype)
    found = results(kernels, hidden, grad)
    check_results(found, hidden, grad, UNIT[dtype])
    assert_equal_bits(found, results(kernels, hidden, grad))


@pytest.mark.parametrize(("rows", "width"), [(80, 512), (4097, 1536), (4097, 100)])
def test_layouts(kernels: Any, rows: int, width: int) -> None:
    """Not to the bit: a stride that vector loads cannot take spreads a tile otherwise over the threads."""
    hidden, grad = pair(rows, width, torch.bfloat16)
    for layout, other in views(hidden).items():
        above = views(grad)[layout]
        check_results(results(kernels, other, above), other, above, UNIT[torch.bfloat16])


def test_no_rows(kernels: Any) -> None:
    empty = torch.empty(0, 512, dtype=torch.bfloat16, device="cuda")
    found = results(kernels, empty, empty)
    assert found["activation"].shape == found["by_hidden"].shape == (0, 512)
    assert not found["sum"].any() and not found["bias"].any()


def test_a_cuda_graph_records_them(kernels: Any) -> None:
    """Compiled by an ordinary call, recorded, and replayed on other values of the same tensors."""
    hidden, grad = pair(4097, 1536, torch.bfloat16)
    results(kernels, hidden, grad)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(kernels, hidden, grad)
    other, above = (
        draw((4097, 1536), torch.bfloat16, "cuda", seed=2),
        draw((4097, 1536), torch.bfloat16, "cuda", seed=3),
    )
    hidden.copy_(other)
    grad.copy_(above)
    graph.replay()
    assert_equal_bits(found, results(kernels, other, above))


def test_offsets_beyond_two_billion(kernels: Any) -> None:
    """In a tensor of more than 2^31 values, the last rows alone are not zero."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GB of GPU memory")
    rows, width = 262_400, 8192
    x = torch.zeros((rows, width), dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    last = draw((100, width), torch.bfloat16, "cuda")
    x[-100:] = last
    found = results(kernels, x, x)
    part = {name: value if value.dim() == 1 else value[-100:] for name, value in found.items()}
    check_results(part, last, last, UNIT[torch.bfloat16])
