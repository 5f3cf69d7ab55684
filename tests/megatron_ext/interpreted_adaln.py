"""The Triton kernels of the AdaLN family in Triton's interpreter on the CPU.

Collected by `test_adaln_interpreted.py` only, in a process of its own: Triton reads TRITON_INTERPRET at its import.
"""

from __future__ import annotations

import pytest
import torch
from helpers.adaln_cases import EPS, OPS, Results, assert_equal_bits, exact, leaves_of, poison_empty_tensors, run
from torch import Tensor

from megatron_ext.kernels.adaln import triton as kernels
from megatron_ext.kernels.adaln.triton_plans import slabs

# Largest relative error of one rounding. The interpreter cuts bf16 off where a GPU rounds to nearest, which doubles it.
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-7, torch.float16: 2**-11}
# fp32 arithmetic: sums of up to 129 values a token and 17 tokens a row, each sum good to a few units of its largest
# partial value, and dx the small difference of three of them.
SLACK = 2**-19


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_empty_tensors(monkeypatch, kernels)


def check(found: Results, wanted: Results) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        error = (found[name].double() - value).abs()
        bound = UNIT[found[name].dtype] * value.abs() + SLACK * value.abs().max()
        assert bool((error <= bound).all()), f"{name}: {(error - bound).max().item():.3g} beyond the tolerance"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [1, 8, 100, 129])
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_outputs_and_gradients(tokens: int, width: int, dtype: torch.dtype) -> None:
    clips, frames = (2, 2) if tokens == 3 else (1, 2)
    leaves, above = leaves_of((clips, frames, tokens, width), dtype)
    for name in OPS:
        found = run(kernels, name, leaves, above)
        assert found["out"].dtype == found["dx"].dtype == dtype
        check(found, exact(name, leaves, above, found))


@pytest.mark.parametrize("programs", [1, 4, 8])
def test_any_cut_into_slabs(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """7 tokens of 2 frames as one, two and four slabs a frame, several steps each, the last one short."""
    for plan in ("norm_forward_plan", "norm_backward_plan", "gate_forward_plan", "gate_backward_plan"):
        planned = getattr(kernels, plan)
        fewer = lambda *a, planned=planned: planned(*a)._replace(rows=2, programs=programs)  # noqa: E731
        monkeypatch.setattr(kernels, plan, fewer)
    leaves, above = leaves_of((1, 2, 7, 136), torch.float32)
    for name in OPS:
        found = run(kernels, name, leaves, above)
        check(found, exact(name, leaves, above, found))
        if programs == 4:
            assert_equal_bits(found, run(kernels, name, leaves, above))


@pytest.mark.parametrize("name", ["pair", "pair-without-gate", "alone"])
@pytest.mark.parametrize("used", ["total", "out"])
def test_an_unused_output(name: str, used: str) -> None:
    leaves, above = leaves_of((2, 1, 3, 12), torch.float32)
    found = run(kernels, name, leaves, above, (used,))
    wanted = exact(name, leaves, above, found, (used,))
    check(found, wanted)
    assert ("dtable" in found) == (name == "pair" or used == "out")


@pytest.mark.parametrize("row_dtype", [torch.bfloat16, torch.float16])
def test_narrow_rows(row_dtype: torch.dtype) -> None:
    leaves, above = leaves_of((2, 2, 3, 12), torch.float16, row_dtype)
    for name in ("adaln", "gated", "pair", "layer-norm"):
        found = run(kernels, name, leaves, above)
        check(found, exact(name, leaves, above, found))


def views(x: Tensor) -> dict[str, Tensor]:
    """The values of x [B,F,T,D] in other layouts."""
    clips, frames, tokens, width = x.shape
    wide = torch.full((clips, frames, tokens, 2 * width), torch.nan)
    wide[..., :width] = x
    long = torch.full((clips, frames, tokens + 1, width), torch.nan)
    long[:, :, :tokens] = x
    return {
        "columns-of-wider": wide[..., :width],
        "tokens-of-longer": long[:, :, :tokens],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "frames-first": x.transpose(0, 1).contiguous().transpose(0, 1),
    }


def test_layouts_of_wide_tensors() -> None:
    """Only one uniform stride is read in place; every other layout is copied, and none changes a bit."""
    leaves, above = leaves_of((2, 2, 3, 12), torch.float32)
    wanted = {name: run(kernels, name, leaves, above) for name in ("adaln", "gated", "pair", "layer-norm")}
    for layout in views(leaves["x"]):
        other = leaves | {leaf: views(leaves[leaf])[layout] for leaf in ("x", "y")}
        gradients = {output: views(value)[layout] for output, value in above.items()}
        assert (kernels._flat(other["x"])[0] is other["x"]) == (layout == "columns-of-wider")
        for name, results in wanted.items():
            assert_equal_bits(results, run(kernels, name, other, gradients))


def test_one_value_for_all() -> None:
    """The gradient of a sum is one number with zero strides."""
    leaves, above = leaves_of((1, 2, 3, 12), torch.float32)
    ones = {output: torch.ones(()).expand(value.shape) for output, value in above.items()}
    for name in OPS:
        found = run(kernels, name, leaves, ones)
        check(found, exact(name, leaves, ones, found))


@pytest.mark.parametrize(("clips", "frames", "tokens"), [(1, 1, 1), (2, 1, 1), (1, 3, 1), (2, 1, 3), (2, 3, 1)])
def test_single_dimensions_have_no_stride(clips: int, frames: int, tokens: int) -> None:
    x = torch.randn(clips, frames, tokens, 16)[..., :12]
    flat, step = kernels._flat(x)
    assert flat is x and (step == 16 or clips * frames * tokens == 1)


def test_gradients_are_shared_not_copied() -> None:
    x, y = (torch.randn(1, 2, 3, 8, requires_grad=True) for _ in range(2))
    row = torch.randn(1, 2, 8)
    above = torch.randn(1, 2, 3, 8)
    dx, _ = torch.autograd.grad(kernels.gated_residual(x, y, row), (x, y), above)
    assert dx.data_ptr() == above.data_ptr()
    _, out = kernels.adaln_residual(x, y, None, row, row, EPS)
    dx, dy = torch.autograd.grad(out, (x, y), above)
    assert dx.data_ptr() == dy.data_ptr()


@pytest.mark.parametrize("splits", [1, 2, 64, 65, 130])
def test_sum_of_splits(splits: int) -> None:
    partial = torch.randn(2, 3, splits, 70)
    torch.testing.assert_close(kernels._sum_splits(partial, splits).view(2, 3, 70), partial.double().sum(2).float())


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_slabs_cover_every_token_once(rows: int) -> None:
    for frames in (1, 2, 21, 98, 300):
        for tokens in (1, 3, 255, 1024, 4096):
            for programs in (132, 528, 1 << 30):
                splits, slab = slabs(frames, tokens, rows, programs)
                assert slab % rows == 0 and (splits - 1) * slab < tokens <= splits * slab


def test_wrong_arguments() -> None:
    x, row = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 8)
    for shape in [(2, 8), (2, 1, 8), (1, 3, 8), (2, 3, 1), (2, 3, 4, 8)]:
        with pytest.raises(ValueError, match=r"modulation .* expected \[B,F,D\]"):
            kernels.adaln(x, row, torch.zeros(shape), EPS)
        with pytest.raises(ValueError, match=r"modulation .* expected \[B,F,D\]"):
            kernels.adaln_residual(x, x, torch.zeros(shape), row, row, EPS)
    with pytest.raises(ValueError, match="expected the same shape"):
        kernels.gated_residual(x, x[:, :, :1], row)
    with pytest.raises(ValueError, match=r"expected .* in fp32, bf16 or fp16"):
        kernels.adaln(x.double(), row, row, EPS)
    with pytest.raises(ValueError, match=r"expected \[D\]"):
        kernels.layer_norm(x, row[0, 0, :1], row[0, 0], EPS)
