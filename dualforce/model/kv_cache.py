"""Keys and values of finished frames, for generation.

Legend: B batch, F frames, T tokens a frame, N heads, K head size.
"""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor

from dualforce.types import FrameSpan, chunk_of


class KVCache:
    """Rotated keys and values of every attention site, for the committed frames that later chunks can still see.

    `stage` adds the frames of the current span behind the committed ones and may be called again and again for the same
    span (each denoising pass overwrites the stage); `commit` makes the last stage permanent and drops the chunks that
    fall out of the window. Memory is bounded when a window is given: at most twice sink + window + span chunks.
    """

    def __init__(self, frames_per_chunk: int, window: int | None = None, sink: int = 0) -> None:
        self.frames_per_chunk, self.window, self.sink = frames_per_chunk, window, sink
        self.frames: list[int] = []  # absolute committed frames, in the order of the buffers' rows
        self._next = 0
        self._staged: FrameSpan | None = None
        self._buffers: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def stage(self, site: Hashable, k: Tensor, v: Tensor, span: FrameSpan) -> tuple[Tensor, Tensor]:
        """Put k and v [B,F,T,N,K] of `span` behind the committed frames; returns views of both, committed + staged.

        Raises ValueError when the span does not follow the committed frames or the number of clips changes.
        """
        if span.start != self._next or k.shape[1] != span.length:
            raise ValueError(f"stage of {span} with {k.shape[1]} frames of keys: expected frame {self._next} next")
        self._staged = span
        used, stop = len(self.frames), len(self.frames) + span.length
        keys, values = self._room(site, k, stop)
        if k.shape[0] != keys.shape[0]:
            raise ValueError(f"stage of {k.shape[0]} clips in a cache of {keys.shape[0]}")
        keys[:, used:stop], values[:, used:stop] = k, v
        return keys[:, :stop], values[:, :stop]

    def commit(self, span: FrameSpan) -> None:
        """Keep the frames staged by the last forward over `span`; ValueError when another span was staged."""
        if self._staged != span:
            raise ValueError(f"commit of frames {span}, but {self._staged} is staged")
        rows = [*self.frames, *span.frames]
        self._next, self._staged = span.stop, None
        coming = chunk_of(span.stop, self.frames_per_chunk)
        kept = [row for row, frame in enumerate(rows) if self._needed(chunk_of(frame, self.frames_per_chunk), coming)]
        if len(kept) < len(rows):
            for buffers in self._buffers.values():
                for buffer in buffers:
                    buffer[:, : len(kept)] = buffer[:, kept]  # indexing by a list copies, so the overlap is safe
        self.frames = [rows[row] for row in kept]

    def _needed(self, chunk: int, coming: int) -> bool:
        return self.window is None or chunk > coming - self.window or chunk < self.sink

    def _room(self, site: Hashable, like: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Buffers of `site` with at least `rows` frames; they grow by doubling."""
        found = self._buffers.get(site)
        if found is None or found[0].shape[1] < rows:
            shape = (like.shape[0], rows if found is None else max(rows, 2 * found[0].shape[1]), *like.shape[2:])
            grown = (like.new_empty(shape), like.new_empty(shape))
            if found is not None:
                used = len(self.frames)
                for new, old in zip(grown, found, strict=True):
                    new[:, :used] = old[:, :used]
            self._buffers[site] = found = grown
        return found
