"""Plans that no rule of the model makes."""

from __future__ import annotations

from megatron_ext.kernels.attention.plan import FramePlan


def everything(query_frames: int, key_frames: int) -> FramePlan:
    """Every query frame sees every key frame."""
    return FramePlan(((0, query_frames),), (((0, key_frames),),))
