"""The reference of the sums for linear layers against autograd in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.linear_cases import check_results, draw, results, views
from torch.nn import functional

from megatron_ext.kernels.linear import reference

# Largest relative error of one rounding to nearest.
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("dtype", UNIT, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (130, 100), (1000, 33)])
def test_against_float64_in_any_layout(rows: int, width: int, dtype: torch.dtype) -> None:
    hidden, grad = draw((rows, width), dtype), draw((rows, width), dtype, seed=1)
    for layout, other in views(hidden).items():
        above = views(grad)[layout]
        check_results(results(reference, other, above), other, above, UNIT[dtype])


def test_equals_autograd_in_float64() -> None:
    """The bias of a linear layer before its GELU, and of one that nothing follows."""
    x, grad = draw((4, 5, 7), torch.float64), draw((4, 5, 7), torch.float64, seed=1)
    bias = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    value = functional.gelu(x + bias, approximate="tanh")
    (wanted,) = torch.autograd.grad(value, bias, grad)
    activation, _, found = reference.gelu_backward(x, grad)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-13)
    torch.testing.assert_close(activation, value.detach(), rtol=0, atol=1e-15)
    (wanted,) = torch.autograd.grad(x + bias, bias, grad)
    torch.testing.assert_close(reference.column_sum(grad), wanted, rtol=0, atol=1e-13)


def test_sums_are_not_taken_in_bf16() -> None:
    """256 + 1 is 256 in bf16."""
    assert reference.column_sum(torch.ones(1000, 3, dtype=torch.bfloat16)).tolist() == [1000.0] * 3


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 3)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    empty = torch.empty(shape)
    assert torch.equal(reference.column_sum(empty), torch.zeros(shape[-1]))
    assert torch.equal(reference.gelu_backward(empty, empty)[2], torch.zeros(shape[-1]))


def test_wrong_arguments() -> None:
    x = torch.zeros(4, 8)
    for wrong in (x[:1], x[:, :1], x.bfloat16()):
        with pytest.raises(ValueError, match="expected the same"):
            reference.gelu_backward(x, wrong)
