"""Inputs for `column_sum` and `gelu_backward`, and what float64 says of their results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Error of fp32 arithmetic in units of what is multiplied or added. Elementwise: that of an exponential, 2^-22 and a few
# roundings of its argument, counts in the sigmoid at most a quarter. Sums: a program adds at most a few dozen values in
# a row, at 2^-24 of the magnitudes added so far each, and rounding errors hardly ever agree.
SLACK = 2**-20


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    """Normal numbers off zero and wide enough (up to 6 and more) for both ends of the activation."""
    source = torch.Generator(device).manual_seed(seed)
    return (1.5 * torch.randn(shape, generator=source, device=device) + 0.25).to(dtype)


def views(x: Tensor) -> dict[str, Tensor]:
    """The values of x [N,D] in other layouts; what lies between them is NaN."""
    rows, width = x.shape
    wide = torch.full((rows, 2 * width + 8), torch.nan, dtype=x.dtype, device=x.device)
    wide[:, 8 : 8 + width] = x
    long = torch.full((2 * rows, width), torch.nan, dtype=x.dtype, device=x.device)
    long[::2] = x
    return {
        "columns-of-wider": wide[:, 8 : 8 + width],
        "every-other-row": long[::2],
        "transposed": x.t().contiguous().t(),
        "more-dimensions": x.view(1, rows, 1, width),
    }


def check_column_sum(found: Tensor, x: Tensor, unit: float) -> None:
    """`unit`: the largest relative error of the last rounding."""
    assert found.shape == x.shape[-1:] and found.dtype == x.dtype and found.is_contiguous()
    rows = x.double().reshape(-1, x.shape[-1])
    _check("sum", found, rows.sum(0), unit, SLACK * rows.abs().sum(0))


def check_gelu_backward(found: tuple[Tensor, Tensor, Tensor], hidden: Tensor, grad: Tensor, unit: float) -> None:
    """Elementwise results against autograd's in float64, and the bias against the sum of what was found."""
    activation, by_hidden, bias = found
    wide = hidden.double().requires_grad_()
    value = functional.gelu(wide, approximate="tanh")
    (slope,) = torch.autograd.grad(value.sum(), wide)
    assert activation.dtype == by_hidden.dtype == hidden.dtype
    _check("activation", activation, value.detach(), unit, SLACK * hidden.double().abs())
    _check("by_hidden", by_hidden, grad.double() * slope, unit, SLACK * grad.double().abs())
    check_column_sum(bias, by_hidden, unit)


def results(kernels: Any, hidden: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Of both operations, by name."""
    activation, by_hidden, bias = kernels.gelu_backward(hidden, grad)
    return {"sum": kernels.column_sum(grad), "activation": activation, "by_hidden": by_hidden, "bias": bias}


def check_results(found: Mapping[str, Tensor], hidden: Tensor, grad: Tensor, unit: float) -> None:
    check_column_sum(found["sum"], grad, unit)
    check_gelu_backward((found["activation"], found["by_hidden"], found["bias"]), hidden, grad, unit)


def _check(name: str, found: Tensor, wanted: Tensor, unit: float, slack: Tensor) -> None:
    assert found.shape == wanted.shape, name
    normal = wanted.abs().clamp(min=torch.finfo(found.dtype).smallest_normal)  # below it, steps shrink no more
    beyond = (found.double() - wanted).abs() - (unit * normal + slack)
    # Not "no element is beyond": a NaN is not either.
    assert bool((beyond <= 0).all()), f"{name}: {beyond.max().item():.3g} beyond the tolerance"
