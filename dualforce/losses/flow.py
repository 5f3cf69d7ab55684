"""Velocity matching per frame (Lipman et al. 2023, arXiv 2210.02747, eq. 23 with the straight path)."""

from __future__ import annotations

from torch import Tensor


def frame_errors(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of every frame: [B,F,...] each -> [B,F] fp32."""
    return (predicted.float() - target.float()).pow(2).flatten(2).mean(-1)
