"""The shared types: what crosses a module boundary, spans and chunks."""

from __future__ import annotations

import pytest

from dualforce import types
from dualforce.types import FrameSpan, chunk_of


@pytest.mark.parametrize("name", ["ClipBatch", "FrameSigma", "Noised", "Velocity", "Conditioning", "LossTerms"])
def test_what_crosses_a_module_boundary_is_a_tuple(name: str) -> None:
    """The hooks of ZeRO-3 look into tuples, not into dataclasses."""
    kind = getattr(types, name)
    assert issubclass(kind, tuple) and kind._fields


def test_span() -> None:
    span = FrameSpan(3, 4)
    assert span.stop == 7 and list(span.frames) == [3, 4, 5, 6]
    assert span == FrameSpan(3, 4) and hash(span) == hash(FrameSpan(3, 4))


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 0), (3, -1)])
def test_span_that_holds_nothing_is_an_error(start: int, length: int) -> None:
    with pytest.raises(ValueError, match=f"{start}.*{length}.*expected"):
        FrameSpan(start, length)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_chunks_are_one_frame_then_groups(size: int) -> None:
    chunks = [0] + [number for number in range(1, 6) for _ in range(size)]
    assert [chunk_of(frame, size) for frame in range(len(chunks))] == chunks
