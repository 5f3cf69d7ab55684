"""Linear layers that initialise themselves, and sinusoids.

ZeRO-3 partitions a module right after its own `__init__`, so a parent cannot overwrite a child's weights: every leaf
sets its own start in `reset_parameters`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


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


class Mlp(nn.Sequential):
    """W2 gelu(W1 x + b1) + b2, tanh form. The backward computes the activation again from W1 x + b1: one elementwise
    pass instead of the largest tensor of a block."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(XavierLinear(dim, hidden), nn.GELU(approximate="tanh"), XavierLinear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """[...,D] -> [...,D]."""
        first, _, second = self
        out: Tensor = _GeluLinear.apply(first(x), second.weight, second.bias)
        return out


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return functional.linear(functional.gelu(hidden, approximate="tanh"), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        by_weight = rows.t() @ functional.gelu(hidden, approximate="tanh").flatten(0, -2)
        by_hidden = torch.ops.aten.gelu_backward(grad @ weight, hidden, approximate="tanh")
        return by_hidden, by_weight, rows.sum(0)


def sinusoid(sigma: Tensor, dim: int) -> Tensor:
    """[..., dim] = [cos | sin](1000 sigma * 10000^(-2i/dim)), angles in float64; in sigma's dtype, at least fp32.

    Wan's `sinusoidal_embedding_1d` at t = 1000 sigma: cos first.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float64, device=sigma.device)
    angle = 1000.0 * sigma.double()[..., None] * torch.pow(10000.0, -index / half)
    dtype = sigma.dtype if sigma.dtype.itemsize >= 4 else torch.float32
    return torch.cat((angle.cos(), angle.sin()), dim=-1).to(dtype)
