"""Frame-causal attention without a mask: one SDPA call a chunk over the frames that the chunk may see.

Legend: B batch, F frames, T tokens a frame, N heads, K head size; q and k may have different F and T.

Exact on every device, no dense mask, and the rows of a chunk are computed from visible keys alone, so later frames
cannot change them by a single bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from megatron_ext.kernels.attention.plan import FramePlan, FrameRange, check_frames


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention, softmax scale 1/sqrt(K): q [B,Lq,N,K], k and v [B,Lk,N,K] -> [B,Lq,N,K] in q's dtype."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def frame_causal(q: Tensor, k: Tensor, v: Tensor, plan: FramePlan) -> Tensor:
    """Attention of frames to frames: q [B,Fq,Tq,N,K], k and v [B,Fk,Tk,N,K] -> [B,Fq,Tq,N,K].

    Raises ValueError when the plan is for another number of query frames or asks for keys that are not there.
    """
    check_frames(q, k, plan)
    parts = []
    for (start, stop), ranges in zip(plan.runs, plan.visible, strict=True):
        keys, values = (_select(x, ranges).flatten(1, 2) for x in (k, v))
        out = attend(q[:, start:stop].flatten(1, 2), keys, values)
        parts.append(out.unflatten(1, (stop - start, q.shape[2])))
    return torch.cat(parts, dim=1)


def _select(x: Tensor, ranges: Sequence[FrameRange]) -> Tensor:
    if len(ranges) == 1:
        return x[:, ranges[0][0] : ranges[0][1]]
    return torch.cat([x[:, start:stop] for start, stop in ranges], dim=1)
