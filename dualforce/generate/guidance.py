"""Guidance on text and audio: which conditional branches a velocity is made of, and with what weights.

v = v_0 + s_t (v_t - v_0) + s_a (v_ta - v_t), where 0 hears and reads nothing, t reads the text, ta reads and hears.
Collected by branch: v = (1 - s_t) v_0 + (s_t - s_a) v_t + s_a v_ta. A branch of weight 0 is not computed, so one row is
enough at s_t = s_a = 1, and no more than three are ever needed.

The branches are rows of one batch, with one cache of as many rows: a chunk has few tokens, so a step reads the weights
once instead of three times and launches a third of the kernels; the memory of the caches is the same either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from dualforce.types import Velocity


class Branch(NamedTuple):
    """One forward row: its share of the velocity and the conditions it sees."""

    weight: float
    text: bool
    audio: bool


def guidance_branches(text_scale: float, audio_scale: float, has_text: bool) -> tuple[Branch, ...]:
    """Branches with a weight other than zero; the weights sum to 1.

    Without a text the text branch is the one without conditions, and `text_scale` has no effect.
    """
    if not has_text:
        text_scale = 1.0
    plain = Branch(1.0 - text_scale, text=False, audio=False)
    read = Branch(text_scale - audio_scale, text=has_text, audio=False)
    heard = Branch(audio_scale, text=has_text, audio=True)
    return tuple(branch for branch in (plain, read, heard) if branch.weight != 0.0)


def combine(branches: Sequence[Branch], velocity: Velocity) -> Velocity:
    """The guided velocity, [1,F,...], from one row per branch, [R,F,...]; with one branch, that row untouched."""
    if len(branches) == 1:
        return velocity
    return Velocity(_weighted(branches, velocity.video), _weighted(branches, velocity.struct))


def _weighted(branches: Sequence[Branch], rows: Tensor) -> Tensor:
    weights = rows.new_tensor([branch.weight for branch in branches])
    return (rows * weights.view(-1, *[1] * (rows.dim() - 1))).sum(dim=0, keepdim=True)
