"""Finished chunks to pictures, as they come: nothing but the chunk in hand is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from dualforce.codecs.protocols import VideoCodec
from dualforce.data.statistics import StreamStatistics
from dualforce.generate.rollout import FinishedChunk


def pictures(
    chunks: Iterable[FinishedChunk], statistics: StreamStatistics, codec: VideoCodec, count: int
) -> Iterator[Any]:
    """The first `count` pictures [H,W,3] uint8 of a clip; the frames that round it up to whole chunks are trimmed."""
    left, decoder = count, codec.decoder()
    for chunk in chunks:
        latents = statistics.denormalise_video(chunk.video.cpu(), chunk.span.start)
        decoded = decoder.decode(latents)[:left]
        yield from decoded
        left -= len(decoded)
        if not left:
            return
