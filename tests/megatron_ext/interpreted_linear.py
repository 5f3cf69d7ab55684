"""The Triton kernels of linear layers in Triton's interpreter on the CPU.

Collected by `test_linear_interpreted.py` only, in a process of its own: Triton reads TRITON_INTERPRET at its import.
"""

from __future__ import annotations

import pytest
import torch
from helpers.adaln_cases import assert_equal_bits, poison_empty_tensors
from helpers.linear_cases import check_column_sum, check_results, draw, results, views

from megatron_ext.kernels.linear import triton as kernels
from megatron_ext.kernels.linear.triton_plans import LINES, final_plan, gelu_plan, sum_plan

# Largest relative error of one rounding. The interpreter cuts bf16 off where a GPU rounds to nearest, which doubles it.
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-7, torch.float16: 2**-11}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_empty_tensors(monkeypatch, kernels)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("width", [1, 7, 100, 1536])
@pytest.mark.parametrize("rows", [1, 3, 128, 130, 300])
def test_against_float64(rows: int, width: int, dtype: torch.dtype) -> None:
    hidden, grad = draw((rows, width), dtype), draw((rows, width), dtype, seed=1)
    found = results(kernels, hidden, grad)
    check_results(found, hidden, grad, UNIT[dtype])
    assert found["activation"].is_contiguous() and found["by_hidden"].is_contiguous()


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("stages", [1, 3])
def test_any_cut_into_slabs(splits: int, stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """23 rows as one, two and five slabs of several steps, the last step and the last slab short; the sums of the slabs
    in several steps too."""
    for plan in ("sum_plan", "gelu_plan"):
        cut = getattr(kernels, plan)(23, 40, 4)._replace(lines=4, splits=splits, slab=-(-23 // splits), stages=stages)
        monkeypatch.setattr(kernels, plan, lambda *_, cut=cut: cut)
    monkeypatch.setattr(kernels, "final_plan", lambda splits: final_plan(splits)._replace(lines=2))
    hidden, grad = draw((23, 40), torch.bfloat16), draw((23, 40), torch.bfloat16, seed=1)
    found = results(kernels, hidden, grad)
    check_results(found, hidden, grad, UNIT[torch.bfloat16])
    assert_equal_bits(found, results(kernels, hidden, grad))


def test_sums_are_not_taken_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """257 + 255 = 512, but 257 is none of the numbers of bf16."""
    cut = sum_plan(512, 3, 2)._replace(splits=2, slab=257)
    for plan in ("sum_plan", "gelu_plan"):
        monkeypatch.setattr(kernels, plan, lambda *_: cut)
    ones, far = torch.ones(512, 3, dtype=torch.bfloat16), torch.full((512, 3), 20.0, dtype=torch.bfloat16)
    assert kernels.column_sum(ones).tolist() == [512.0] * 3
    assert kernels.gelu_backward(far, ones)[2].tolist() == [512.0] * 3  # its derivative is 1


def test_more_slabs_than_a_tile_of_sums_holds() -> None:
    x = draw((2 * LINES * 129, 2), torch.float32)
    plan = sum_plan(*x.shape, 4)
    assert plan.splits > LINES == final_plan(plan.splits).lines
    check_column_sum(kernels.column_sum(x), x, UNIT[x.dtype])


@pytest.mark.parametrize("rows", [3, 130])
def test_layouts(rows: int) -> None:
    """Rows at one stride are read in place, others are copied; the interpreter adds both in the same order."""
    hidden, grad = draw((rows, 24), torch.float32), draw((rows, 24), torch.float32, seed=1)
    wanted = results(kernels, hidden, grad)
    for layout, other in views(hidden).items():
        read, _ = kernels._rows(other)
        assert (read.data_ptr() == other.data_ptr()) == (layout != "transposed"), layout
        found = results(kernels, other, views(grad)[layout])
        assert_equal_bits({name: found[name].view(wanted[name].shape) for name in found}, wanted)
        assert_equal_bits(results(kernels, hidden, other.view_as(hidden)), results(kernels, hidden, hidden))


@pytest.mark.parametrize(("shape", "count"), [((2, 65, 7), 130), ((1, 1), 1), ((5,), 1)])
def test_one_value_for_all(shape: tuple[int, ...], count: int) -> None:
    """The gradient of a sum is one number with zero strides; a bias may be added to a single row."""
    found = kernels.column_sum(torch.full((), 1.5).expand(shape))
    assert torch.equal(found, torch.full(shape[-1:], 1.5 * count))


def test_one_row_for_all() -> None:
    row = torch.arange(7.0)
    assert torch.equal(kernels.column_sum(row.expand(130, 7)), 130 * row)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 3)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    empty = torch.empty(shape, dtype=torch.bfloat16)
    activation, by_hidden, bias = kernels.gelu_backward(empty, empty)
    assert activation.shape == by_hidden.shape == shape
    for found in (bias, kernels.column_sum(empty)):
        assert torch.equal(found, torch.zeros(shape[-1:], dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_far_from_zero(dtype: torch.dtype) -> None:
    """The exponential vanishes; the activation is h or 0, its derivative 1 or 0."""
    hidden = torch.tensor([[8.0, 20.0, 1e4, -20.0, -1e4, 0.0]], dtype=dtype)
    activation, by_hidden, bias = kernels.gelu_backward(hidden, torch.full_like(hidden, 3.0))
    assert torch.equal(activation, hidden.clamp(min=0))
    assert torch.equal(by_hidden, torch.tensor([[3.0, 3.0, 3.0, 0.0, 0.0, 1.5]], dtype=dtype))
    assert torch.equal(bias, by_hidden[0])


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("plan_of", [sum_plan, gelu_plan])
def test_slabs_cover_every_row_once(plan_of: type, itemsize: int) -> None:
    for rows in (1, 3, 80, 128, 129, 255, 4097, 20480, 3_000_000):
        for width in (1, 7, 100, 512, 1536, 8960, 500_000):
            plan = plan_of(rows, width, itemsize)
            assert (plan.splits - 1) * plan.slab < rows <= plan.splits * plan.slab
            assert all(size & (size - 1) == 0 for size in (plan.lines, plan.block))  # powers of two
            assert plan.lines * plan.block * itemsize <= 8192


def test_wrong_arguments() -> None:
    x = torch.zeros(4, 8)
    for wrong in (x.double(), x.int(), torch.zeros(()), torch.zeros(4, 0)):
        with pytest.raises(ValueError, match=r"expected \[...,D\] with D > 0 in fp32, bf16 or fp16"):
            kernels.column_sum(wrong)
        with pytest.raises(ValueError, match=r"expected \[...,D\] with D > 0 in fp32, bf16 or fp16"):
            kernels.gelu_backward(wrong, wrong)
    for wrong in (x[:1], x[:, :1], x.bfloat16()):
        with pytest.raises(ValueError, match="expected the same"):
            kernels.gelu_backward(x, wrong)
