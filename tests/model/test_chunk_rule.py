"""Which chunks see which, against the definition (model reference 6)."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dualforce.model.path import ChunkRule


def label(frame: int, n: int) -> int:
    """Chunks [1, n, n, ...] by counting."""
    chunk, left = 0, 1
    for _ in range(frame):
        left -= 1
        if left == 0:
            chunk, left = chunk + 1, n
    return chunk


def allowed(query: int, key: int, n: int, window: int | None, sink: int) -> bool:
    b_q, b_k = label(query, n), label(key, n)
    if b_k > b_q:
        return False
    return window is None or b_k > b_q - window or b_k < sink


def holds(rule: ChunkRule, queries: list[int], keys: list[int]) -> None:
    plan = rule.plan(queries, keys)
    runs, visible = plan.runs, plan.visible
    assert len(runs) == len(visible)
    assert [place for start, stop in runs for place in range(start, stop)] == list(range(len(queries)))
    for (start, stop), ranges in zip(runs, visible, strict=True):
        places = [place for first, last in ranges for place in range(first, last)]
        assert all(a[1] < b[0] for a, b in pairwise(ranges)), "ranges touch or overlap"
        assert all(first < last for first, last in ranges)
        for query in queries[start:stop]:
            assert places == [i for i, key in enumerate(keys) if allowed(query, key, *rule)]


rules = st.builds(ChunkRule, st.integers(1, 4), st.none() | st.integers(1, 4), st.integers(0, 3))


@given(rule=rules, start=st.integers(0, 9), length=st.integers(1, 12))
def test_a_span_against_itself(rule: ChunkRule, start: int, length: int) -> None:
    holds(rule, list(range(start, start + length)), list(range(start, start + length)))


@given(rule=rules, start=st.integers(0, 12), length=st.integers(1, 6), data=st.data())
def test_a_span_against_any_committed_frames(rule: ChunkRule, start: int, length: int, data: st.DataObject) -> None:
    committed = sorted(data.draw(st.sets(st.integers(0, start - 1)))) if start else []
    span = list(range(start, start + length))
    holds(rule, span, committed + span)


@given(rule=rules, ranks=st.integers(1, 4), size=st.integers(1, 4))
def test_a_ranks_frames_against_all(rule: ChunkRule, ranks: int, size: int) -> None:
    frames = list(range(ranks * size))
    for rank in range(ranks):
        holds(rule, frames[rank * size : (rank + 1) * size], frames)


def test_an_example() -> None:
    """Chunks 0 | 1 2 | 3 4 | 5 6: with window 2 and sink 1 the last sees 0, 3..6."""
    plan = ChunkRule(2, 2, 1).plan(range(7), range(7))
    assert plan.runs == ((0, 1), (1, 3), (3, 5), (5, 7))
    assert plan.visible == (((0, 1),), ((0, 3),), ((0, 5),), ((0, 1), (3, 7)))
    assert plan.pairs(10, 3) == 10 * 3 * (1 + 2 * 3 + 2 * 5 + 2 * 5)
