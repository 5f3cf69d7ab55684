"""The scheduling of chunks: rows against the matrix of the papers, lag and horizon."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualforce.generate.pyramid import rows, scheduling_matrix

SMALL = st.integers(1, 7)


def levels_by_row(steps: int, chunks: int, lag: int, horizon: int) -> list[list[int]]:
    """Levels of all chunks before each row and at the end, rebuilt from the rows alone."""
    level = [steps] * chunks
    table = []
    for row in rows(steps, chunks, lag, horizon):
        table.append(list(level))
        for offset, done in enumerate(row.done):
            assert level[row.first + offset] == steps - done
            level[row.first + offset] -= 1
    return [*table, level]


@given(steps=SMALL, chunks=SMALL, lag=SMALL)
def test_rows_are_the_scheduling_matrix(steps: int, chunks: int, lag: int) -> None:
    matrix = scheduling_matrix(steps, chunks, lag)
    found = levels_by_row(steps, chunks, lag, horizon=chunks)
    # With a lag above K the matrix has rows in which nothing moves; the rows leave them out.
    moving = [row for i, row in enumerate(matrix) if i == 0 or row != matrix[i - 1]]
    assert found == moving


def test_matrix_by_hand() -> None:
    assert scheduling_matrix(2, 3, 1) == [[2, 2, 2], [1, 2, 2], [0, 1, 2], [0, 0, 1], [0, 0, 0]]


@given(steps=SMALL, chunks=SMALL, lag=SMALL, horizon=SMALL)
def test_every_chunk_takes_all_steps_inside_the_horizon(steps: int, chunks: int, lag: int, horizon: int) -> None:
    table = levels_by_row(steps, chunks, lag, horizon)
    assert table[-1] == [0] * chunks
    for row in rows(steps, chunks, lag, horizon):
        assert 1 <= len(row.done) <= horizon
        assert all(ahead - behind >= lag for ahead, behind in pairwise(row.done))


def test_lag_of_all_steps_is_one_chunk_at_a_time() -> None:
    assert [row.done for row in rows(3, 2, 3, 8)] == [(0,), (1,), (2,)] * 2
    assert max(len(row.done) for row in rows(3, 4, 1, 8)) == 3


@pytest.mark.parametrize("name", ["steps", "chunks", "lag", "horizon"])
def test_sizes_below_one_are_refused(name: str) -> None:
    sizes = {"steps": 1, "chunks": 1, "lag": 1, "horizon": 1} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} 0: expected at least 1"):
        list(rows(**sizes))
