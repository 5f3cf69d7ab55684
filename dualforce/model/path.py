"""Which keys a query may see: all frames at once (training), or one span against a cache (generation).

Legend: B batch, F frames, T tokens a frame, N heads, K head size. A path is called as `path(site, q, k, v)` with
q [B,F,Tq,N,K], k and v [B,F,Tk,N,K], rotated, and returns [B,F,Tq,N,K].
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dualforce.model.kv_cache import KVCache
from dualforce.types import FrameSpan, chunk_of
from megatron_ext.kernels.attention.plan import FramePlan
from megatron_ext.kernels.kernel_set import KernelSet
from megatron_ext.parallel.grid import ProcessGrid
from megatron_ext.parallel.ulysses import frames_to_heads, gather_frames, heads_to_frames, shard_frames

VIDEO, STRUCT, STRUCT_TO_VIDEO, VIDEO_TO_STRUCT = "video", "struct", "struct_to_video", "video_to_struct"


class Site(NamedTuple):
    """One attention of the model."""

    stream: str
    layer: int


class Path(Protocol):
    """Attention of a site's queries to the keys that they may see."""

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...

    def both(self, one: Callable[[], Tensor], other: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """The results of two independent pieces of work, of which the second is small."""
        ...


class ChunkRule(NamedTuple):
    """Chunks [1, n, n, ...]; a query of chunk b sees the chunks b - window < c <= b and c < sink."""

    frames_per_chunk: int
    window: int | None
    sink: int

    def plan(self, queries: Sequence[int], keys: Sequence[int]) -> FramePlan:
        """For absolute frames `queries` and `keys`, both in order: runs of queries of one chunk, and the keys each run
        sees, as positions in the given sequences."""
        query_chunks, key_chunks = ([chunk_of(frame, self.frames_per_chunk) for frame in x] for x in (queries, keys))
        edges = [0, *(i for i in range(1, len(queries)) if query_chunks[i] != query_chunks[i - 1]), len(queries)]
        visible = []
        for start in edges[:-1]:
            chunk = query_chunks[start]
            last = bisect_right(key_chunks, chunk)
            first = 0 if self.window is None else bisect_right(key_chunks, chunk - self.window)
            sink = min(bisect_left(key_chunks, self.sink), last)
            visible.append(((0, last),) if sink >= first else ((0, sink), (first, last)) if sink else ((first, last),))
        return FramePlan(tuple(pairwise(edges)), tuple(visible))


class FullPath:
    """All frames of `span` at once, frame-causal by chunk, split over the sequence-parallel ranks of `grid`.

    `span` counts the frames of all ranks; `local` are this rank's. Raises ValueError when grid.sp does not divide it.
    """

    def __init__(self, rule: ChunkRule, kernels: KernelSet, span: FrameSpan, grid: ProcessGrid | None = None) -> None:
        self._grid = grid or ProcessGrid.single()
        if span.length % self._grid.sp:
            raise ValueError(f"{span.length} frames over {self._grid.sp} ranks: pad to a multiple first")
        size = span.length // self._grid.sp
        self.local = FrameSpan(span.start + self._grid.sp_rank * size, size)
        self._kernels = kernels
        self._plan = rule.plan(span.frames, span.frames)
        self._local_plan = rule.plan(self.local.frames, span.frames)
        self._beside: torch.cuda.Stream | None = None
        self._side = self._grid.beside()

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._grid.sp == 1:
            return self._kernels.frame_causal(q, k, v, self._plan)
        if site.stream in (STRUCT, STRUCT_TO_VIDEO):
            # A frame has few structure tokens: bringing their keys to every rank costs less than exchanging queries.
            grid = self._side if site.stream == STRUCT else self._grid
            keys, values = gather_frames(torch.cat((k, v)), grid).chunk(2)
            return self._kernels.frame_causal(q, keys, values, self._local_plan)
        # One exchange each: what arrives is already in order, and a packed one would have to be taken apart.
        q, k, v = (frames_to_heads(x, self._grid) for x in (q, k, v))
        return heads_to_frames(self._kernels.frame_causal(q, k, v, self._plan), self._grid)

    def both(self, one: Callable[[], Tensor], other: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Side by side within a CUDA graph: the second, of many short launches, then hides behind the first. Exchanges
        of the second must be those of the structure stream, which have a communicator of their own."""
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return one(), other()
        here = torch.cuda.current_stream()
        if self._beside is None:
            self._beside = torch.cuda.Stream()
        self._beside.wait_stream(here)
        with torch.cuda.stream(self._beside):
            second = other()
        first = one()
        here.wait_stream(self._beside)
        return first, second

    def shard(self, x: Tensor) -> Tensor:
        """This rank's frames [B,F/sp,...] of x [B,F,...]."""
        return shard_frames(x, self._grid)

    def gather(self, x: Tensor) -> Tensor:
        """All frames [B,F,...] of this rank's x [B,F/sp,...], differentiable."""
        return gather_frames(x, self._grid)


class CachedPath:
    """The frames of `span` against the committed frames of `cache` and themselves.

    The span may hold several chunks: each sees the committed frames and the staged chunks up to itself. Nothing is
    committed here (`KVCache.commit`).
    """

    def __init__(self, cache: KVCache, kernels: KernelSet, span: FrameSpan) -> None:
        rule = ChunkRule(cache.frames_per_chunk, cache.window, cache.sink)
        self._cache, self._kernels, self._span = cache, kernels, span
        self._plan = rule.plan(span.frames, [*cache.frames, *span.frames])

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self._cache.stage(site, k, v, self._span)
        return self._kernels.frame_causal(q, keys, values, self._plan)

    def both(self, one: Callable[[], Tensor], other: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """One after the other."""
        return one(), other()
