"""Noise-level schedules (flow matching, model reference 5)."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

LevelT = TypeVar("LevelT", float, Tensor)


def shift(u: LevelT, s: float) -> LevelT:
    """s u / (1 + (s - 1) u): keeps 0 and 1, moves the middle up for s > 1 and down for s < 1 (Esser et al. 2024,
    arXiv 2403.03206, eq. 23)."""
    return s * u / (1 + (s - 1) * u)


def joint_levels(steps: int, shift_video: float, shift_struct: float) -> tuple[Tensor, Tensor]:
    """Noise levels of both streams for `steps` Euler steps, each [steps + 1] fp64 from 1 to 0 on one grid u.

    With shift_struct < shift_video structure leads: it is cleaner than the video at every step (trap T3).
    """
    if steps < 1:
        raise ValueError(f"steps = {steps}: expected at least 1")
    u = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    return shift(u, shift_video), shift(u, shift_struct)


def fixed_levels(count: int) -> Tensor:
    """The validation levels (k + 1/2) / count, [count] fp64: midpoints of equal bins of [0, 1]."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count
