"""Which keys a query may see: all frames at once (training), or one span against a cache (generation).

Legend: B batch, F frames, T tokens a frame, N heads, K head size. A path is called as `path(site, q, k, v)` with
q [B,F,Tq,N,K], k and v [B,F,Tk,N,K], rotated, and returns [B,F,Tq,N,K].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dualforce.model.kv_cache import KVCache
from dualforce.types import FrameSpan, chunk_of
from megatron_ext.kernels.kernel_set import KernelSet
from megatron_ext.parallel.grid import ProcessGrid
from megatron_ext.parallel.ulysses import frames_to_heads, gather_frames, heads_to_frames, shard_frames

VIDEO, STRUCT, STRUCT_TO_VIDEO, VIDEO_TO_STRUCT = "video", "struct", "struct_to_video", "video_to_struct"

Ranges = list[tuple[int, int]]


class Site(NamedTuple):
    """One attention of the model."""

    stream: str
    layer: int


class Path(Protocol):
    """Attention of a site's queries to the keys that they may see."""

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class ChunkRule(NamedTuple):
    """Chunks [1, n, n, ...]; a query of chunk b sees the chunks b - window < c <= b and c < sink."""

    frames_per_chunk: int
    window: int | None
    sink: int

    def sees(self, query: int, key: int) -> bool:
        """Whether chunk `query` sees chunk `key`."""
        return key <= query and (self.window is None or key > query - self.window or key < self.sink)

    def plan(self, queries: Sequence[int], keys: Sequence[int]) -> tuple[Ranges, list[Ranges]]:
        """For absolute frames `queries` and `keys`: runs of queries of one chunk, and the key ranges each run sees,
        both as positions in the given sequences."""
        query_chunks = [chunk_of(frame, self.frames_per_chunk) for frame in queries]
        key_chunks = [chunk_of(frame, self.frames_per_chunk) for frame in keys]
        runs = _runs(query_chunks)
        visible = [_ranges([self.sees(query_chunks[start], chunk) for chunk in key_chunks]) for start, _ in runs]
        return runs, visible


def _runs(values: Sequence[int]) -> Ranges:
    edges = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1]), len(values)]
    return list(pairwise(edges))


def _ranges(flags: Sequence[bool]) -> Ranges:
    return [(start, stop) for start, stop in _runs([int(flag) for flag in flags]) if flags[start]]


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

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._grid.sp == 1:
            return self._kernels.frame_causal(q, k, v, *self._plan)
        if site.stream == STRUCT_TO_VIDEO:
            # A frame has few structure tokens: bringing them to every rank is cheaper than exchanging video queries.
            keys, values = gather_frames(torch.cat((k, v)), self._grid).chunk(2)
            return self._kernels.frame_causal(q, keys, values, *self._local_plan)
        if q.shape == k.shape:
            q, k, v = frames_to_heads(torch.cat((q, k, v)), self._grid).chunk(3)
        else:
            q = frames_to_heads(q, self._grid)
            k, v = frames_to_heads(torch.cat((k, v)), self._grid).chunk(2)
        return heads_to_frames(self._kernels.frame_causal(q, k, v, *self._plan), self._grid)

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
        return self._kernels.frame_causal(q, keys, values, *self._plan)
