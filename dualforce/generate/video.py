"""Finished chunks to pictures, as they come: nothing but the chunk in hand is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from torch import Tensor

from dualforce.data.statistics import StreamStatistics
from dualforce.generate.rollout import FinishedChunk


class FrameDecoder(Protocol):
    """The part of a video codec that generation needs."""

    def decode_frames(self, latents: Tensor, first: bool) -> Any:
        """Latents [n,C,h,w] of consecutive frames -> pictures [P,H,W,3] uint8; `first`: latents[0] is frame 0."""


def pictures(
    chunks: Iterable[FinishedChunk], statistics: StreamStatistics, codec: FrameDecoder, count: int
) -> Iterator[Any]:
    """The first `count` pictures [H,W,3] uint8 of a clip; the frames that round it up to whole chunks are trimmed."""
    left = count
    for chunk in chunks:
        latents = statistics.denormalise_video(chunk.video.cpu(), chunk.span.start)
        decoded = codec.decode_frames(latents, first=chunk.span.start == 0)[:left]
        yield from decoded
        left -= len(decoded)
        if not left:
            return
