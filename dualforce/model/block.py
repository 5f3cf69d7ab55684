"""One transformer block of a tower, and the head (model reference 2.4 and 2.5).

Legend: B batch, F frames, T tokens a frame, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualforce.config import TowerConfig
from dualforce.model.attention import SelfAttention, TextAttention
from dualforce.model.layers import Mlp, ZeroLinear
from dualforce.model.path import Path, Site
from dualforce.model.rope import Rotary
from megatron_ext.kernels.kernel_set import KernelSet


class Block(nn.Module):
    """Self-attention, text cross-attention and MLP; the first and the last modulated and gated per frame."""

    def __init__(self, config: TowerConfig, kernels: KernelSet, site: Site) -> None:
        super().__init__()
        dim, heads, eps = config.dim, config.heads, config.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.self_attn = SelfAttention(dim, heads, eps, kernels, site)
        if config.text:
            self.norm3 = nn.LayerNorm(dim, eps=eps)
            self.cross_attn = TextAttention(dim, heads, eps, kernels)
        self.ffn = Mlp(dim, config.ffn, kernels)
        self._text, self._eps, self._kernels = config.text, eps, kernels

    def forward(
        self, x: Tensor, t_mod: Tensor, text: Tensor, rotary: Rotary, path: Path, added: Tensor | None = None
    ) -> Tensor:
        """x [B,F,T,D], to which `added` is added, t_mod [B,F,6,D] fp32, text [B,E,D] -> [B,F,T,D]."""
        rows = (self.modulation.to(t_mod.dtype)[:, None] + t_mod).unbind(2)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = rows
        x, u = self._kernels.adaln_residual(x, added, None, shift_a, scale_a, self._eps)
        attended = self.self_attn(u, rotary, path)
        if not self._text:
            x, u = self._kernels.adaln_residual(x, attended, gate_a, shift_f, scale_f, self._eps)
            return self._kernels.gated_residual(x, self.ffn(u), gate_f)
        # The affine norm as a modulation that all frames share: 1 + (weight - 1), the residual in the same pass.
        bias, weight = (row.expand_as(gate_a) for row in (self.norm3.bias, self.norm3.weight.to(gate_a.dtype) - 1))
        x, normed = self._kernels.adaln_residual(x, attended, gate_a, bias, weight, self._eps)
        crossed = self.cross_attn(normed, text)
        x, u = self._kernels.adaln_residual(x, crossed, None, shift_f, scale_f, self._eps)
        return self._kernels.gated_residual(x, self.ffn(u), gate_f)


class Head(nn.Module):
    """Modulated norm and projection to the prediction; starts at zero."""

    def __init__(self, dim: int, out: int, eps: float, kernels: KernelSet) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.head = ZeroLinear(dim, out)
        self._eps, self._kernels = eps, kernels

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [B,F,T,D], e [B,F,D] (the time embedding itself) -> [B,F,T,out]."""
        shift, scale = (self.modulation.to(e.dtype)[:, None] + e[:, :, None]).unbind(2)
        return self.head(self._kernels.adaln(x, shift, scale, self._eps))
