"""Which chunks are denoised together, and how far each one is.

Levels count remaining steps: K is noise, 0 is clean. The scheduling matrix of Diffusion Forcing with a lag of u steps,
M[m, j] = clip(K + j u - m, 0, K), gives the level of chunk j before row m. u >= K finishes a chunk before the next one
starts (autoregressive), a smaller lag keeps several chunks in flight, each less noisy than the next (pyramid).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Row(NamedTuple):
    """One denoising step: chunks `first .. first + len(done) - 1` advance from `done` steps each to `done + 1`."""

    first: int
    done: tuple[int, ...]


def scheduling_matrix(steps: int, chunks: int, lag: int) -> list[list[int]]:
    """M[m][j] for m = 0 .. K + (chunks - 1) u: levels of all chunks when any number may be in flight."""
    rows = steps + (chunks - 1) * lag + 1
    return [[min(max(steps + j * lag - m, 0), steps) for j in range(chunks)] for m in range(rows)]


def rows(steps: int, chunks: int, lag: int, horizon: int) -> Iterator[Row]:
    """The denoising steps of `chunks` chunks in order.

    A chunk starts when its predecessor is at least `lag` steps ahead or finished, and fewer than `horizon` chunks are
    in flight; once started it advances in every row. Where the horizon does not bind, the rows are those of
    `scheduling_matrix`. Raises ValueError for sizes below 1.
    """
    for name, value in (("steps", steps), ("chunks", chunks), ("lag", lag), ("horizon", horizon)):
        if value < 1:
            raise ValueError(f"{name} {value}: expected at least 1")
    first, done = 0, [0]
    while done:
        yield Row(first, tuple(done))
        done = [count + 1 for count in done]
        if done[0] == steps:
            done, first = done[1:], first + 1
        following = first + len(done)
        if following < chunks and len(done) < horizon and (not done or done[-1] >= lag):
            done.append(0)
