"""RMSNorm over the full width of q and k, split into heads, then rotary positions.

x [B,F,T,D]; weight [D]; cos and sin [F,T',K/2] in fp32 with T' = T or 1; result [B,F,T,N,K] in x's dtype.
RMSNorm: Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4; rotary positions: Su et al. 2021, arXiv 2104.09864, eq. 34.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, in fp32, returned in x's dtype."""
    wide = x if x.dtype.itemsize >= 4 else x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the pairs of x [B,F,T,N,K]: neighbours (2i, 2i+1) when interleaved, else halves (i, i + K/2)."""
    wide = x if x.dtype.itemsize >= 4 else x.float()
    cos, sin = (t.to(wide.dtype)[:, :, None, :] for t in (cos, sin))
    if interleaved:
        a, b = wide[..., 0::2], wide[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)
    a, b = wide.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


def split_heads(
    x: Tensor,
    weights: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    parts: int,
    heads: int,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, ...]:
    """Heads of `parts` projections packed side by side in x [B,F,T,parts·D]: `parts` tensors [B,F,T,N,K] in x's dtype.

    The first len(weights) parts are normed over their width D with weights[i] [D] and rotated (cos None: not rotated),
    both in fp32 with one rounding at the end; the others pass unchanged, as views of x.
    """
    out = [part.unflatten(-1, (heads, -1)) for part in x.chunk(parts, dim=-1)]
    for i, weight in enumerate(weights):
        wide = out[i] if x.dtype.itemsize >= 4 else out[i].float()
        wide = rms_norm(wide.flatten(-2), weight, eps).unflatten(-1, (heads, -1))
        if cos is not None and sin is not None:
            wide = rotate(wide, cos, sin, interleaved)
        out[i] = wide.to(x.dtype)
    return tuple(out)
