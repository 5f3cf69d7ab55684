"""Inputs for the products of linear layers, and what float64 says of their results."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# Of the magnitudes that a product adds up: fp32 keeps 2^-24 of them in each addition, the tensor cores of a GPU cut off
# a few bits more, and errors hardly ever agree.
SUM = 2**-18
# The GPU's own tanh (PTX tanh.approx.f32) has a relative error of 2^-11; GELU takes half of it times hidden, its
# derivative a few times that.
TANH, SLOPE = 2**-12, 2**-9


class Case(NamedTuple):
    """A layer D -> H, the hidden values before its GELU, the layer after it, H -> D, and the gradient of the output."""

    x: Tensor
    weight_1: Tensor
    bias_1: Tensor
    hidden: Tensor
    weight_2: Tensor
    bias_2: Tensor
    grad: Tensor


def draw_case(rows: int, dim: int, inner: int, dtype: torch.dtype, device: str = "cpu") -> Case:
    """Results of about 1, hidden values of up to 6."""
    source = torch.Generator(device).manual_seed(rows + dim)

    def some(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=source, device=device)).to(dtype)

    return Case(
        some(rows, dim), some(inner, dim, scale=dim**-0.5), some(inner), some(rows, inner, scale=1.5),
        some(dim, inner, scale=inner**-0.5), some(dim), some(rows, dim),
    )  # fmt: skip


def results(kernels: Any, case: Case) -> dict[str, Tensor]:
    """Of every function, by name; products in the layouts of forward and backward."""
    found = {
        "forward": kernels.product(case.hidden, case.weight_2.t(), case.bias_2),
        "backward": kernels.product(case.hidden, case.weight_1),
    }
    found["hidden"], found["after"] = kernels.gelu_product(case.x, case.weight_1.t(), case.bias_1)
    names = ("activation", "by_hidden", "by_bias")
    return found | dict(zip(names, kernels.gelu_product_backward(case.grad, case.weight_2, case.hidden), strict=True))


def check_results(found: dict[str, Tensor], case: Case, unit: float) -> None:
    """`unit`: the largest relative error of one rounding. What is applied to a rounded product has one more of them."""
    wide = Case(*(tensor.double() for tensor in case))
    sizes = Case(*(tensor.abs() for tensor in wide))
    forward = wide.hidden @ wide.weight_2.t() + wide.bias_2
    _check("forward", found, forward, unit, SUM * (sizes.hidden @ sizes.weight_2.t() + sizes.bias_2))
    _check("backward", found, wide.hidden @ wide.weight_1, unit, SUM * (sizes.hidden @ sizes.weight_1))
    hidden = wide.x @ wide.weight_1.t() + wide.bias_1
    slack = SUM * (sizes.x @ sizes.weight_1.t() + sizes.bias_1)
    _check("hidden", found, hidden, unit, slack)
    after, _ = _gelu(hidden)
    # GELU's slope is 1.13 at most.
    _check("after", found, after, unit, 1.13 * (slack + unit * hidden.abs()) + TANH * hidden.abs())
    activation, slope = _gelu(wide.hidden)
    _check("activation", found, activation, unit, TANH * sizes.hidden)
    above, slack = wide.grad @ wide.weight_2, SUM * (sizes.grad @ sizes.weight_2)
    slack = 1.13 * (slack + unit * above.abs()) + SLOPE * above.abs()
    _check("by_hidden", found, above * slope, unit, slack)
    # Roundings of many rows hardly ever agree: their sum grows as the root of the rows; five times that.
    spread = 5 * (unit * (above * slope)).square().sum(0).sqrt() + 5 * slack.square().sum(0).sqrt()
    _check("by_bias", found, (above * slope).sum(0), unit, spread)


def _gelu(hidden: Tensor) -> tuple[Tensor, Tensor]:
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        value = functional.gelu(leaf, approximate="tanh")
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), slope


def _check(name: str, found: dict[str, Tensor], wanted: Tensor, unit: float, slack: Tensor) -> None:
    assert found[name].shape == wanted.shape, name
    normal = wanted.abs().clamp(min=torch.finfo(found[name].dtype).smallest_normal)  # below it, steps shrink no more
    beyond = (found[name].double() - wanted).abs() - (unit * normal + slack)
    # Not "no element is beyond": a NaN is not either.
    assert bool((beyond <= 0).all()), f"{name}: {beyond.max().item():.3g} beyond the tolerance"
