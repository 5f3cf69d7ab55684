"""Linear layers that initialise themselves, their products on token streams, and sinusoids.

ZeRO-3 partitions a module right after its own `__init__`, so a parent cannot overwrite a child's weights: every leaf
sets its own start in `reset_parameters`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megatron_ext.kernels.kernel_set import KernelSet


class XavierLinear(nn.Linear):
    """Xavier-uniform weight, zero bias (Wan's start of its linear layers)."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


class EmbeddingLinear(nn.Linear):
    """N(0, 0.02) weight, zero bias (Wan's start of its text MLP)."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


class ZeroLinear(nn.Linear):
    """Zero weight and bias: what follows starts without influence."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class WideEmbeddingLinear(EmbeddingLinear):
    """Computes in the dtype of its input (fp32 in a bf16 model): noise levels need more than 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class WideZeroLinear(ZeroLinear):
    """Computes in the dtype of its input (fp32 in a bf16 model)."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def linear(x: Tensor, weight: Tensor, bias: Tensor, kernels: KernelSet) -> Tensor:
    """[...,D] -> [...,D']: weight x + bias. The gradient of the bias, a sum over all tokens, is the kernels'."""
    out: Tensor = _Linear.apply(x, weight, bias, kernels)
    return out


class Mlp(nn.Sequential):
    """W2 gelu(W1 x + b1) + b2, tanh form. The backward reads W1 x + b1 anyway, so it computes the activation from it
    again instead of keeping a tensor that large."""

    def __init__(self, dim: int, hidden: int, kernels: KernelSet) -> None:
        super().__init__(XavierLinear(dim, hidden), nn.GELU(approximate="tanh"), XavierLinear(hidden, dim))
        self._kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """[...,D] -> [...,D]."""
        first, _, second = self
        out: Tensor = _Mlp.apply(x, first.weight, first.bias, second.weight, second.bias, self._kernels)
        return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, kernels: KernelSet) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.kernels, ctx.place = kernels, _place(weight)
        out: Tensor = kernels.product(_rows(x), weight.t(), bias)
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        rows = _rows(grad)
        return (
            ctx.kernels.product(rows, weight).view_as(x) if wants_x else None,
            _by_weight(rows, _rows(x), ctx.place) if wants_weight else None,
            ctx.kernels.column_sum(rows) if wants_bias else None,
            None,
        )


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_1: Tensor, bias_1: Tensor, weight_2: Tensor, bias_2: Tensor, kernels: KernelSet
    ) -> Tensor:
        hidden, activation = kernels.gelu_product(_rows(x), weight_1.t(), bias_1)
        ctx.save_for_backward(x, hidden, weight_1, weight_2)
        ctx.kernels, ctx.places = kernels, (_place(weight_1), _place(weight_2))
        out: Tensor = kernels.product(activation, weight_2.t(), bias_2)
        return out.view(*x.shape[:-1], weight_2.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, weight_1, weight_2 = ctx.saved_tensors
        wants_x, wants_weight_1, wants_bias_1, wants_weight_2, wants_bias_2, _ = ctx.needs_input_grad
        rows = _rows(grad)
        activation, by_hidden, by_bias_1 = ctx.kernels.gelu_product_backward(rows, weight_2, hidden)
        by_weight_2 = _by_weight(rows, activation, ctx.places[1]) if wants_weight_2 else None
        del activation  # as large as hidden
        return (
            ctx.kernels.product(by_hidden, weight_1).view_as(x) if wants_x else None,
            _by_weight(by_hidden, _rows(x), ctx.places[0]) if wants_weight_1 else None,
            by_bias_1 if wants_bias_1 else None,
            by_weight_2,
            ctx.kernels.column_sum(rows) if wants_bias_2 else None,
            None,
        )


def _place(weight: Tensor) -> Callable[[], Tensor | None] | None:
    """Where a weight that is a slice of a larger tensor wants its gradient (`train.gather_unit`)."""
    return getattr(weight, "gradient_place", None)


def _by_weight(grad: Tensor, x: Tensor, place: Callable[[], Tensor | None] | None) -> Tensor:
    """grad [N,D'], x [N,D] -> the weight's gradient [D',D], written where it is wanted."""
    room = None if place is None else place()
    if room is None or room.dtype != grad.dtype:
        return grad.t() @ x
    return torch.mm(grad.t(), x, out=room)


def _rows(x: Tensor) -> Tensor:
    """[...,D] -> [N,D]."""
    return x.reshape(-1, x.shape[-1])


def sinusoid(sigma: Tensor, dim: int) -> Tensor:
    """[..., dim] = [cos | sin](1000 sigma * 10000^(-2i/dim)), angles in float64; in sigma's dtype, at least fp32.

    Wan's `sinusoidal_embedding_1d` at t = 1000 sigma: cos first.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float64, device=sigma.device)
    angle = 1000.0 * sigma.double()[..., None] * torch.pow(10000.0, -index / half)
    dtype = sigma.dtype if sigma.dtype.itemsize >= 4 else torch.float32
    return torch.cat((angle.cos(), angle.sin()), dim=-1).to(dtype)
