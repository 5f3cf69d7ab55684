"""Adaptive LayerNorm with one modulation row per frame (Peebles and Xie 2023, arXiv 2212.09748, section 3.2).

x, y [B,F,T,D]; shift, scale, gate [B,F,D], of any float dtype and strides, broadcast over the T tokens of a frame and
never expanded. Statistics and arithmetic in fp32; the result has x's dtype.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, the norm without affine parameters."""
    normed = functional.layer_norm(_fp32(x), x.shape[-1:], eps=eps)
    return (normed * (1 + _rows(scale, x)) + _rows(shift, x)).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y."""
    return (_fp32(x) + _rows(gate, x) * _fp32(y)).to(x.dtype)


def adaln_residual(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + gate * y, adaln of that sum as rounded to x's dtype); without a gate x + y, without a y x alone: its two
    gradients are then added in the pass of the norm's."""
    if y is None:
        return x, adaln(x, shift, scale, eps)
    total = (_fp32(x) + _fp32(y)).to(x.dtype) if gate is None else gated_residual(x, y, gate)
    return total, adaln(total, shift, scale, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * weight + bias over the last dimension; x [...,D], weight, bias [D]."""
    wide = _fp32(x)
    return functional.layer_norm(wide, x.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps).to(x.dtype)


def check_rows(row: Tensor, x: Tensor) -> None:
    """A modulation is [B,F,D] for x [B,F,T,D]: a row per clip or one for all would broadcast without a word."""
    if row.dim() != 3 or row.shape[:2] != x.shape[:2] or row.shape[2] != x.shape[3]:
        raise ValueError(f"modulation {tuple(row.shape)} for x {tuple(x.shape)}: expected [B,F,D]")


def _fp32(x: Tensor) -> Tensor:
    return x if x.dtype.itemsize >= 4 else x.float()


def _rows(row: Tensor, x: Tensor) -> Tensor:
    """[B,F,D] -> [B,F,1,D]."""
    check_rows(row, x)
    return _fp32(row).unsqueeze(2)
