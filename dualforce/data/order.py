"""Which clip is trained on when: a pure function of (hash of the shard set, seed, step), whatever the number of ranks.

Clips are numbered over the whole run: clip g belongs to epoch g // count and is the (g % count)-th of its permutation.
A step takes the next `clips_per_step` numbers, so a step may end one epoch and begin the next, every clip comes exactly
once per epoch, and resuming needs the step alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class ClipRef(NamedTuple):
    """One clip of a step: `position` in its epoch (it keys the clip's noise) and `index` in the split of its bucket."""

    epoch: int
    position: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nothing needs
    bucket: int = 0


def permutation(shards: str, seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Order of the `count` clips of the set with hash `shards` in `epoch`, [count] int64.

    Sorts the raw words of a Philox generator. The sort is stable, so equal words do not matter.
    """
    return np.argsort(random_words(shards, seed, epoch, count), kind="stable").astype(np.int64)


def random_words(shards: str, seed: int, turn: int, count: int) -> NDArray[np.uint64]:
    """[count] words of a Philox generator keyed by (shards, seed, turn): unlike the methods of numpy's Generator, the
    words are promised to stay the same over versions and platforms."""
    digest = hashlib.sha256(shards.encode()).digest()  # always eight words, so that no two keys run into each other
    key = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, len(digest), 4)]
    return np.random.Philox(np.random.SeedSequence([*key, seed, turn])).random_raw(count).astype(np.uint64)


@dataclass(frozen=True)
class ClipOrder:
    """The order of the `count` clips of a split, epoch by epoch.

    Raises ValueError for a negative seed or a count below 1.
    """

    shards: str  # hash of the set
    seed: int
    count: int
    # The permutations of the last two epochs: a step needs no more, and making one takes longer than reading a clip.
    _epochs: dict[int, NDArray[np.int64]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.seed < 0 or self.count < 1:
            raise ValueError(f"seed {self.seed}, count {self.count}: expected seed >= 0, count >= 1")

    def clips_of_step(self, step: int, clips_per_step: int) -> list[ClipRef]:
        """The `clips_per_step` clips of optimizer step `step` (from 0), over all ranks.

        Raises ValueError for a negative step or clips_per_step below 1.
        """
        if step < 0 or clips_per_step < 1:
            raise ValueError(f"step {step}, clips_per_step {clips_per_step}: expected step >= 0, clips_per_step >= 1")
        first = step * clips_per_step
        return [self._clip(number) for number in range(first, first + clips_per_step)]

    def clips_of_rank(self, step: int, clips_per_step: int, dp_rank: int, dp_size: int) -> list[ClipRef]:
        """The part of data-parallel rank `dp_rank` in step `step`: clips dp_rank * n to (dp_rank + 1) * n - 1 of
        `clips_of_step`, n = clips_per_step / dp_size.

        Raises ValueError where the ranks do not divide the clips, and as `clips_of_step`.
        """
        if dp_size < 1 or clips_per_step % dp_size or not 0 <= dp_rank < dp_size:
            raise ValueError(
                f"rank {dp_rank} of {dp_size}, clips_per_step {clips_per_step}: "
                "expected 0 <= rank < size, and a multiple"
            )
        each = clips_per_step // dp_size
        return self.clips_of_step(step, clips_per_step)[dp_rank * each : (dp_rank + 1) * each]

    def replacements(self, ref: ClipRef) -> Iterator[ClipRef]:
        """What takes the place of a clip that cannot be read, in order: the clips that follow it in its epoch's order,
        from the last on to the first. The position stays, and with it the noise."""
        order = self._order(ref.epoch)
        for further in range(1, self.count):
            yield ref._replace(index=int(order[(ref.position + further) % self.count]))

    def _clip(self, number: int) -> ClipRef:
        epoch, position = divmod(number, self.count)
        return ClipRef(epoch, position, int(self._order(epoch)[position]))

    def _order(self, epoch: int) -> NDArray[np.int64]:
        found = self._epochs.get(epoch)
        if found is None:
            found = permutation(self.shards, self.seed, epoch, self.count)
            for old in sorted(self._epochs)[:-1]:
                self._epochs.pop(old, None)
            self._epochs[epoch] = found
        return found


def worker_of(step: int, workers: int) -> int:
    """Which of `workers` processes reads a step."""
    return step % workers
