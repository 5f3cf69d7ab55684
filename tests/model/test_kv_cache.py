"""The KV cache: order of calls, what eviction keeps, and bounded memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dualforce.model.kv_cache import KVCache
from dualforce.types import FrameSpan

SITES = ("video", "struct")


def rows(span: FrameSpan, offset: float = 0.0, batch: int = 1) -> Tensor:
    """Keys whose content is their frame number (plus offset)."""
    return (torch.tensor(list(span.frames)) + offset)[None, :, None, None, None].expand(batch, -1, 2, 1, 3)


def stage(cache: KVCache, span: FrameSpan, offset: float = 0.0) -> list[float]:
    """Stage keys and (negated) values at every site; returns the frame numbers that come back."""
    for site in SITES:
        keys, values = cache.stage(site, rows(span, offset), -rows(span, offset), span)
        assert torch.equal(keys, -values) and keys.shape[2:] == (2, 1, 3)
    return keys[0, :, 0, 0, 0].tolist()


def test_later_passes_overwrite_the_stage() -> None:
    cache = KVCache(frames_per_chunk=2)
    first, second = FrameSpan(0, 1), FrameSpan(1, 2)
    assert stage(cache, first, 0.5) == [0.5]
    assert stage(cache, first) == [0]
    assert cache.frames == []
    cache.commit(first)
    assert stage(cache, second, 0.25) == [0, 1.25, 2.25]
    assert stage(cache, second) == [0, 1, 2]
    assert cache.frames == [0]
    cache.commit(second)
    assert cache.frames == [0, 1, 2]
    assert stage(cache, FrameSpan(3, 2)) == [0, 1, 2, 3, 4]


def test_a_longer_or_shorter_stage_replaces_the_last() -> None:
    cache = KVCache(2)
    assert stage(cache, FrameSpan(0, 5), 0.5) == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert stage(cache, FrameSpan(0, 1)) == [0]
    cache.commit(FrameSpan(0, 1))
    assert stage(cache, FrameSpan(1, 4)) == [0, 1, 2, 3, 4]


def test_calls_out_of_order_are_errors() -> None:
    cache = KVCache(2)
    with pytest.raises(ValueError, match="expected frame 0 next"):
        stage(cache, FrameSpan(1, 2))
    with pytest.raises(ValueError, match="None is staged"):
        cache.commit(FrameSpan(0, 1))
    stage(cache, FrameSpan(0, 1))
    with pytest.raises(ValueError, match="is staged"):
        cache.commit(FrameSpan(0, 3))
    cache.commit(FrameSpan(0, 1))
    with pytest.raises(ValueError, match="None is staged"):
        cache.commit(FrameSpan(0, 1))
    for span in (FrameSpan(0, 1), FrameSpan(2, 2)):  # behind, and a gap
        with pytest.raises(ValueError, match="expected frame 1 next"):
            stage(cache, span)


def test_keys_of_another_shape_are_errors() -> None:
    cache = KVCache(2)
    with pytest.raises(ValueError, match="with 2 frames"):
        cache.stage("video", rows(FrameSpan(0, 2)), rows(FrameSpan(0, 2)), FrameSpan(0, 1))
    twice = rows(FrameSpan(0, 1), batch=2)
    cache.stage("video", twice, twice, FrameSpan(0, 1))
    with pytest.raises(ValueError, match="1 clips in a cache of 2"):  # and not: broadcast to both
        cache.stage("video", rows(FrameSpan(0, 1)), rows(FrameSpan(0, 1)), FrameSpan(0, 1))


@given(
    n=st.integers(1, 3),
    window=st.none() | st.integers(1, 3),
    sink=st.integers(0, 2),
    chunks_per_commit=st.lists(st.integers(1, 3), min_size=1, max_size=8),
)
def test_eviction_keeps_exactly_what_later_chunks_may_see(
    n: int, window: int | None, sink: int, chunks_per_commit: list[int]
) -> None:
    cache = KVCache(n, window, sink)

    def sees(query: int, key: int) -> bool:
        return key <= query and (window is None or key > query - window or key < sink)

    chunk = start = 0
    for count in chunks_per_commit:
        length = sum(1 if i == 0 else n for i in range(chunk, chunk + count))
        span = FrameSpan(start, length)
        held = list(cache.frames)
        assert stage(cache, span, 0.5) == held + [frame + 0.5 for frame in span.frames]
        assert stage(cache, span) == held + list(span.frames)  # rows are still those of their frames
        cache.commit(span)
        chunk, start = chunk + count, span.stop
        visible = {
            frame
            for frame in range(start)
            for later in range(chunk, chunk + 8)
            if sees(later, 0 if frame == 0 else 1 + (frame - 1) // n)
        }
        assert cache.frames == sorted(visible)


def test_memory_is_bounded_with_a_window() -> None:
    n, window, sink = 2, 3, 1
    cache = KVCache(n, window, sink)
    start, most = 0, 0
    for chunk in range(200):
        span = FrameSpan(start, n if chunk else 1)
        keys, _ = cache.stage("video", rows(span), rows(span), span)
        cache.commit(span)
        start = span.stop
        most = max(most, keys.untyped_storage().nbytes() // keys[:, :1].numel() // keys.element_size())
        assert len(cache.frames) <= 1 + n * window
    assert start == 399 and most <= 2 * (1 + n * (window + 1))  # buffers double at most


def test_without_a_window_everything_is_kept() -> None:
    cache = KVCache(1)
    for frame in range(40):
        assert stage(cache, FrameSpan(frame, 1)) == list(range(frame + 1))
        cache.commit(FrameSpan(frame, 1))
