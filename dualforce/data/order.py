"""Which clip is trained on when: a pure function of (seed, step), whatever the number of ranks.

Clips are numbered over the whole run: clip g belongs to epoch g // count and is the (g % count)-th of its permutation.
A step takes the next `clips_per_step` numbers, so a step may end one epoch and begin the next, every clip comes exactly
once per epoch, and resuming needs the step alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class ClipRef(NamedTuple):
    """One clip of a step: `position` in its epoch (it keys the clip's noise) and `index` in the split."""

    epoch: int
    position: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nothing needs


def clips_of_rank(
    step: int, clips_per_step: int, count: int, seed: int, dp_rank: int, dp_size: int
) -> list[ClipRef]:
    """The part of data-parallel rank `dp_rank` in step `step`: clips dp_rank * n to (dp_rank + 1) * n - 1 of
    `clips_of_step`, n = clips_per_step / dp_size.

    Raises ValueError where the ranks do not divide the clips, and as `clips_of_step`.
    """
    if dp_size < 1 or clips_per_step % dp_size or not 0 <= dp_rank < dp_size:
        raise ValueError(
            f"rank {dp_rank} of {dp_size}, clips_per_step {clips_per_step}: expected 0 <= rank < size, and a multiple"
        )
    each = clips_per_step // dp_size
    return clips_of_step(step, clips_per_step, count, seed)[dp_rank * each : (dp_rank + 1) * each]


def replacements(ref: ClipRef, count: int, seed: int) -> Iterator[ClipRef]:
    """What takes the place of a clip that cannot be read, in order: the clips that follow it in its epoch's order, from
    the last on to the first. The position stays, and with it the noise."""
    order = permutation(seed, ref.epoch, count)
    for further in range(1, count):
        yield ref._replace(index=int(order[(ref.position + further) % count]))


def permutation(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Order of `count` clips in `epoch`, [count] int64.

    Sorts the raw words of a Philox generator: unlike the methods of numpy's Generator, the words are promised to stay
    the same over versions and platforms. The sort is stable, so equal words do not matter.
    """
    words = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)


def clips_of_step(step: int, clips_per_step: int, count: int, seed: int) -> list[ClipRef]:
    """The `clips_per_step` clips of optimizer step `step` (from 0), over all ranks, from a split of `count` clips.

    Raises ValueError for a negative step or seed, or a count or clips_per_step below 1.
    """
    if step < 0 or seed < 0 or clips_per_step < 1 or count < 1:
        raise ValueError(
            f"step {step}, seed {seed}, clips_per_step {clips_per_step}, count {count}: "
            "expected step and seed >= 0, clips_per_step and count >= 1"
        )
    first = step * clips_per_step
    numbers = range(first, first + clips_per_step)
    orders = {epoch: permutation(seed, epoch, count) for epoch in range(first // count, numbers[-1] // count + 1)}
    return [ClipRef(g // count, g % count, int(orders[g // count][g % count])) for g in numbers]
