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

FrameRange = tuple[int, int]  # start and stop of frames


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention, softmax scale 1/sqrt(K): q [B,Lq,N,K], k and v [B,Lk,N,K] -> [B,Lq,N,K] in q's dtype."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def frame_causal(
    q: Tensor, k: Tensor, v: Tensor, chunks: Sequence[FrameRange], visible: Sequence[Sequence[FrameRange]]
) -> Tensor:
    """Attention of frames to frames: the query frames `chunks[i]` see the key frames of all ranges in `visible[i]`.

    q [B,Fq,Tq,N,K], k and v [B,Fk,Tk,N,K] -> [B,Fq,Tq,N,K]. The chunks must cover the query frames in order, and a
    chunk must see at least one frame (ValueError).
    """
    parts = []
    covered = 0
    for (start, stop), ranges in zip(chunks, visible, strict=True):
        if start != covered or not ranges:
            raise ValueError(f"query frames {start}..{stop} after {covered}, visible {list(ranges)}: expected no gap")
        covered = stop
        keys, values = (_select(x, ranges).flatten(1, 2) for x in (k, v))
        out = attend(q[:, start:stop].flatten(1, 2), keys, values)
        parts.append(out.unflatten(1, (stop - start, q.shape[2])))
    if covered != q.shape[1]:
        raise ValueError(f"chunks end at frame {covered}, but there are {q.shape[1]} query frames")
    return torch.cat(parts, dim=1)


def _select(x: Tensor, ranges: Sequence[FrameRange]) -> Tensor:
    if len(ranges) == 1:
        return x[:, ranges[0][0] : ranges[0][1]]
    return torch.cat([x[:, start:stop] for start, stop in ranges], dim=1)
