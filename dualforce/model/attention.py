"""Attention layers: self-attention, text cross-attention, and the bridge's cross-attention.

Legend: B batch, F frames, T tokens a frame, D width, N heads, K head size, E text tokens.
Weights of q, k and v (or k and v) are packed into one product; exported files carry them apart.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualforce.model.layers import XavierLinear, ZeroLinear
from dualforce.model.path import Path, Site
from dualforce.model.rope import Rotary
from megatron_ext.kernels.kernel_set import KernelSet


class HeadNorm(nn.Module):
    """RMSNorm with a learned weight over the full width, then heads, then rotation where positions are given."""

    def __init__(self, dim: int, heads: int, eps: float, kernels: KernelSet, interleaved: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self._heads, self._eps, self._kernels, self._interleaved = heads, eps, kernels, interleaved

    def forward(self, x: Tensor, rotary: Rotary | None = None) -> Tensor:
        """[...,D] -> [...,N,K]; with `rotary`, x is [B,F,T,D]."""
        if rotary is None:
            return self._kernels.rms_norm(x, self.weight, self._eps).unflatten(-1, (self._heads, -1))
        return self._kernels.norm_rope(
            x, self.weight, rotary.cos, rotary.sin, heads=self._heads, eps=self._eps, interleaved=self._interleaved
        )


class SelfAttention(nn.Module):
    """Frame-causal self-attention of one tower (model reference 2.4)."""

    def __init__(self, dim: int, heads: int, eps: float, kernels: KernelSet, site: Site) -> None:
        super().__init__()
        self.qkv = XavierLinear(dim, 3 * dim)
        self.norm_q = HeadNorm(dim, heads, eps, kernels)
        self.norm_k = HeadNorm(dim, heads, eps, kernels)
        self.o = XavierLinear(dim, dim)
        self._heads, self._site = heads, site

    def forward(self, x: Tensor, rotary: Rotary, path: Path) -> Tensor:
        """x [B,F,T,D] -> [B,F,T,D]."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        v = v.unflatten(-1, (self._heads, -1))
        out = path(self._site, self.norm_q(q, rotary), self.norm_k(k, rotary), v)
        return self.o(out.flatten(-2))


class TextAttention(nn.Module):
    """Cross-attention to the text; every frame sees all of it, and padding is not masked (model reference 2.3)."""

    def __init__(self, dim: int, heads: int, eps: float, kernels: KernelSet) -> None:
        super().__init__()
        self.q = XavierLinear(dim, dim)
        self.kv = XavierLinear(dim, 2 * dim)
        self.norm_q = HeadNorm(dim, heads, eps, kernels)
        self.norm_k = HeadNorm(dim, heads, eps, kernels)
        self.o = XavierLinear(dim, dim)
        self._heads, self._kernels = heads, kernels

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x [B,F,T,D], text [B,E,D] -> [B,F,T,D]."""
        k, v = self.kv(text).chunk(2, dim=-1)
        q = self.norm_q(self.q(x)).flatten(1, 2)
        out = self._kernels.attend(q, self.norm_k(k), v.unflatten(-1, (self._heads, -1)))
        return self.o(out.flatten(-2)).view_as(x)


class BridgeAttention(nn.Module):
    """Attention from one tower's tokens to the other's, frame-causal, with half-split rotary positions (4.3, 4.4)."""

    def __init__(
        self, dim: int, other: int, heads: int, eps: float, kernels: KernelSet, site: Site, zero_init: bool
    ) -> None:
        super().__init__()
        self.q = XavierLinear(dim, dim)
        self.kv = XavierLinear(other, 2 * dim)
        self.norm_q = HeadNorm(dim, heads, eps, kernels, interleaved=False)
        self.norm_k = HeadNorm(dim, heads, eps, kernels, interleaved=False)
        self.o = (ZeroLinear if zero_init else XavierLinear)(dim, dim)
        self._heads, self._site = heads, site

    def forward(self, x: Tensor, other: Tensor, x_rotary: Rotary, other_rotary: Rotary, path: Path) -> Tensor:
        """x [B,F,Tx,D], other [B,F,Ty,D'] -> [B,F,Tx,D]."""
        k, v = self.kv(other).chunk(2, dim=-1)
        q, k = self.norm_q(self.q(x), x_rotary), self.norm_k(k, other_rotary)
        out = path(self._site, q, k, v.unflatten(-1, (self._heads, -1)))
        return self.o(out.flatten(-2))
