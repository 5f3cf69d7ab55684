"""Rotary angles from absolute positions, computed in float64 and never tabled (Su et al. 2021, arXiv 2104.09864).

The towers rotate neighbouring pairs, the bridge rotates halves; both take cos and sin of shape [F,T,K/2].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dualforce.types import FrameSpan, struct_pixels

BASE = 10000.0


class Rotary(NamedTuple):
    """cos and sin [F,T,K/2] of the positions of T tokens (or 1 for all) in each of F frames."""

    cos: Tensor
    sin: Tensor


def video_rotary(
    span: FrameSpan, height: int, width: int, head_dim: int, device: torch.device, dtype: torch.dtype
) -> Rotary:
    """Wan's 3-D positions: pairs split [frame | row | column], 2 (K // 6) dims each for row and column, the rest for
    the absolute latent frame (model reference 2.6). T = height * width tokens, row-major."""
    side = 2 * (head_dim // 6)
    frame = _angles(torch.arange(span.start, span.stop, device=device), head_dim - 2 * side)
    row = _angles(torch.arange(height, device=device), side)
    col = _angles(torch.arange(width, device=device), side)
    shape = (span.length, height, width, -1)
    parts = (
        frame[:, None, None, :].expand(shape),
        row[None, :, None, :].expand(shape),
        col[None, None, :, :].expand(shape),
    )
    return _rotary(torch.cat(parts, dim=-1).flatten(1, 2), dtype)


def struct_rotary(span: FrameSpan, head_dim: int, device: torch.device, dtype: torch.dtype) -> Rotary:
    """1-D positions over the whole head: the pixel frame of each slot, T = Q."""
    return _rotary(_angles(struct_pixels(span).to(device), head_dim), dtype)


def bridge_rotary(span: FrameSpan, head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[Rotary, Rotary]:
    """(video, struct) positions in pixel frames: a latent frame j > 0 lies at the centre 4j - 1.5 of its four pixel
    frames, frame 0 at 0 (model reference 4.4). T is 1 for video, Q for struct."""
    pixels = struct_pixels(span).to(device=device, dtype=torch.float64)
    centre = pixels.mean(dim=1, keepdim=True)
    return _rotary(_angles(centre, head_dim), dtype), _rotary(_angles(pixels, head_dim), dtype)


def _angles(position: Tensor, dim: int) -> Tensor:
    index = torch.arange(0, dim, 2, dtype=torch.float64, device=position.device)
    return position.double()[..., None] * torch.pow(BASE, -index / dim)


def _rotary(angle: Tensor, dtype: torch.dtype) -> Rotary:
    wide = dtype if dtype.itemsize >= 4 else torch.float32
    return Rotary(angle.cos().to(wide), angle.sin().to(wide))
