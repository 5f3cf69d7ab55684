"""Attention layers: self-attention, text cross-attention, and the bridge's cross-attention.

Legend: B batch, F frames, T tokens a frame, D width, N heads, K head size, E text tokens.
Weights of q, k and v (or k and v) are packed into one product; exported files carry them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dualforce.model.layers import XavierLinear, ZeroLinear, linear
from dualforce.model.path import Path, Site
from dualforce.model.rope import Rotary
from megatron_ext.kernels.kernel_set import KernelSet


class HeadNorm(nn.Module):
    """Weight of an RMSNorm over the full width of a projection; `split_heads` applies it with the rotation."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Heads(NamedTuple):
    """Products on token streams, and how they become heads."""

    kernels: KernelSet
    heads: int
    eps: float
    interleaved: bool = True

    def project(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """layer(x), [...,D] -> [...,D']."""
        return linear(x, layer.weight, layer.bias, self.kernels)

    def split(self, x: Tensor, parts: int, norms: Sequence[HeadNorm], rotary: Rotary | None) -> tuple[Tensor, ...]:
        """x [B,F,T,parts*D] -> `parts` tensors [B,F,T,N,K]; the first len(norms) normed, and rotated given `rotary`."""
        cos, sin = rotary or (None, None)
        return self.kernels.split_heads(
            x, [norm.weight for norm in norms], cos, sin,
            parts=parts, heads=self.heads, eps=self.eps, interleaved=self.interleaved,
        )  # fmt: skip


class SelfAttention(nn.Module):
    """Frame-causal self-attention of one tower (model reference 2.4)."""

    def __init__(self, dim: int, heads: int, eps: float, kernels: KernelSet, site: Site) -> None:
        super().__init__()
        self.qkv = XavierLinear(dim, 3 * dim)
        self.norm_q = HeadNorm(dim)
        self.norm_k = HeadNorm(dim)
        self.o = XavierLinear(dim, dim)
        self._heads, self._site = Heads(kernels, heads, eps), site

    def forward(self, x: Tensor, rotary: Rotary, path: Path) -> Tensor:
        """x [B,F,T,D] -> [B,F,T,D]."""
        q, k, v = self._heads.split(self._heads.project(self.qkv, x), 3, (self.norm_q, self.norm_k), rotary)
        return self._heads.project(self.o, path(self._site, q, k, v).flatten(-2))


class TextAttention(nn.Module):
    """Cross-attention to the text; every frame sees all of it, and padding is not masked (model reference 2.3)."""

    def __init__(self, dim: int, heads: int, eps: float, kernels: KernelSet) -> None:
        super().__init__()
        self.q = XavierLinear(dim, dim)
        self.kv = XavierLinear(dim, 2 * dim)
        self.norm_q = HeadNorm(dim)
        self.norm_k = HeadNorm(dim)
        self.o = XavierLinear(dim, dim)
        self._heads = Heads(kernels, heads, eps)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """x [B,F,T,D], text [B,E,D] -> [B,F,T,D]."""
        (q,) = self._heads.split(self._heads.project(self.q, x), 1, (self.norm_q,), None)
        k, v = self._heads.split(self._heads.project(self.kv, text)[:, None], 2, (self.norm_k,), None)
        out = self._heads.kernels.attend(q.flatten(1, 2), k[:, 0], v[:, 0])
        return self._heads.project(self.o, out.flatten(-2)).view_as(x)


class BridgeAttention(nn.Module):
    """Attention from one tower's tokens to the other's, frame-causal, with half-split rotary positions (4.3, 4.4)."""

    def __init__(
        self, dim: int, other: int, heads: int, eps: float, kernels: KernelSet, site: Site, zero_init: bool
    ) -> None:
        super().__init__()
        self.q = XavierLinear(dim, dim)
        self.kv = XavierLinear(other, 2 * dim)
        self.norm_q = HeadNorm(dim)
        self.norm_k = HeadNorm(dim)
        self.o = (ZeroLinear if zero_init else XavierLinear)(dim, dim)
        self._heads, self._site = Heads(kernels, heads, eps, interleaved=False), site

    def forward(self, x: Tensor, other: Tensor, x_rotary: Rotary, other_rotary: Rotary, path: Path) -> Tensor:
        """x [B,F,Tx,D], other [B,F,Ty,D'] -> [B,F,Tx,D]."""
        (q,) = self._heads.split(self._heads.project(self.q, x), 1, (self.norm_q,), x_rotary)
        k, v = self._heads.split(self._heads.project(self.kv, other), 2, (self.norm_k,), other_rotary)
        return self._heads.project(self.o, path(self._site, q, k, v).flatten(-2))
