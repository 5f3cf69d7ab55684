"""Optimizer steps of one rank, read and collated: what the trainer's own thread and its loader processes both do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from data_shards.reader import ShardReader
from data_shards.remote.fetch import RemoteError
from data_shards.schema import ClipSample, MachineError, ShardError
from dualforce.config import ConfigError, DataConfig
from dualforce.data.ahead import ReadAhead
from dualforce.data.bucket_order import BucketOrder
from dualforce.data.buckets import bucket_size
from dualforce.data.collate import collate
from dualforce.data.order import ClipRef
from dualforce.data.statistics import StreamStatistics
from dualforce.types import AUDIO_FRAMES, ClipBatch

NOTHING = range(0)


class Damaged(NamedTuple):
    """A clip that could not be read: the step (from 0) that met it, the bucket (number of its set), the file of the set
    (the tar, or that of its checksums), its key, what of it is wrong there (`ShardError.member`), the whole message."""

    step: int
    bucket: int
    shard: str
    key: str
    member: str
    reason: str


class StepRead(NamedTuple):
    """A step as read: its micro-batches, every clip met in it that cannot be read, in the order of the step, and why
    there are no micro-batches where there are none."""

    batches: list[ClipBatch]
    damaged: list[Damaged]
    fault: ShardError | None


@dataclass(frozen=True, eq=False)
class Deal:
    """Which part of a step a rank reads, and what becomes of it; a process gets this once.

    Data-parallel rank r takes the step's clips [r * per_rank, (r + 1) * per_rank), per_rank = data.clips_per_step /
    dp_size, in micro-batches of `micro_batch`.
    """

    statistics: StreamStatistics
    data: DataConfig
    context: int  # 50 Hz frames of audio on each side of a window
    text_dim: int
    seed: int
    dp_rank: int
    dp_size: int
    micro_batch: int

    def check(self, readers: Sequence[ShardReader]) -> None:
        """ConfigError for sizes that do not divide, a crop longer than the clips, or a split without clips; ValueError
        for another number of readers than `data.shards` names."""
        clips = self.data.clips_per_step
        if self.dp_size < 1 or not 0 <= self.dp_rank < self.dp_size:
            raise ConfigError(f"data-parallel rank {self.dp_rank} of {self.dp_size}: expected 0 <= rank < size")
        if clips % self.dp_size:
            raise ConfigError(
                f"data.clips_per_step: {clips}: expected a multiple of {self.dp_size} data-parallel ranks"
            )
        per_rank = clips // self.dp_size
        if self.micro_batch < 1 or per_rank % self.micro_batch:
            raise ConfigError(
                f"micro-batch {self.micro_batch}: expected a divisor of the {per_rank} clips per step and rank"
            )
        for frames, reader in zip(self.data.lengths, readers, strict=True):
            if not len(reader):
                raise ConfigError(f"data.shards: {reader.source}: 0 clips in the split: expected at least 1")
            if frames > reader.frames:
                raise ConfigError(
                    f"data.frames: {frames}: expected at most {reader.frames}, the latent frames of clips in "
                    f"{reader.source}"
                )


class StepReader:
    """Reads steps in any order. What comes is a pure function of the step and of what can be read, in any process: a
    clip that cannot be read is replaced by the first one after it (`ClipOrder.replacements`) that can.

    `readers` and `hashes` are of the sets of `data.shards`, a bucket each; a step is of one of them.
    It remembers what could not be read, so as not to try again, and gives up once that is more than
    `data.max_damaged`: whoever counts the damage over all processes then has counted as much.
    """

    def __init__(self, readers: Sequence[ShardReader], hashes: Sequence[str], deal: Deal) -> None:
        self._readers, self._deal = tuple(readers), deal
        sizes = map(bucket_size, hashes, readers, deal.data.lengths)
        self._order = BucketOrder(list(sizes), deal.seed)
        self._beyond = -(-deal.context // AUDIO_FRAMES)  # latent frames of sound that the last window looks into
        self._unreadable: dict[tuple[int, int], Damaged] = {}  # bucket and index of a clip
        read = partial(_read_clip, self._readers, deal.data.lengths, self._beyond)
        self._ahead = ReadAhead(read, max(reader.source.at_once for reader in readers))

    def bucket_of_step(self, step: int) -> int:
        """Which bucket a step is of."""
        return self._order.bucket_of_step(step)

    def read(self, step: int, then: range = NOTHING) -> StepRead:
        """Read and collate the micro-batches of one step. A ShardError becomes the `fault`.

        `then` are the steps that will be asked for next, in their order. Where clips are read several at a time, those
        of the next step are begun too (or as many as there are threads): a clip that takes long holds none of them up.
        """
        deal, met = self._deal, dict[tuple[int, int], Damaged]()
        own = self._refs(step)
        parts = [own[i : i + deal.micro_batch] for i in range(0, len(own), deal.micro_batch)]
        further = itertools.chain.from_iterable(self._refs(after) for after in then if self._ahead.threads)
        refs = itertools.chain(own, itertools.islice(further, max(len(own), self._ahead.threads)))
        self._ahead.expect([clip for ref in refs if (clip := (ref.bucket, ref.index)) not in self._unreadable])
        try:
            return StepRead([self._batch(step, refs, met) for refs in parts], list(met.values()), None)
        except ShardError as error:
            return StepRead([], list(met.values()), error)

    def _refs(self, step: int) -> list[ClipRef]:
        deal = self._deal
        return self._order.clips_of_rank(step, deal.data.clips_per_step, deal.dp_rank, deal.dp_size)

    def _batch(self, step: int, refs: list[ClipRef], met: dict[tuple[int, int], Damaged]) -> ClipBatch:
        samples = [self._read(step, ref, met) for ref in refs]
        deal, frames = self._deal, self._deal.data.lengths[refs[0].bucket]
        return collate(samples, refs, deal.statistics, frames, deal.context, deal.text_dim)

    def _read(self, step: int, ref: ClipRef, met: dict[tuple[int, int], Damaged]) -> ClipSample:
        reader = self._readers[ref.bucket]
        for choice in itertools.chain((ref,), self._order.replacements(ref)):
            clip = choice.bucket, choice.index
            if clip not in self._unreadable:
                try:
                    return self._ahead.take(clip)
                except (RemoteError, MachineError):  # not the clip's fault, nor that of every rank
                    raise
                except ShardError as error:
                    key = reader.key(choice.index)
                    found = Damaged(step, choice.bucket, error.shard, key, error.member, str(error))
                    self._unreadable[clip] = found
            # Told of in every step that meets it: another process may have met it first, in a later step.
            found = self._unreadable[clip]._replace(step=step)
            met.setdefault(clip, found)
            if len(self._unreadable) > self._deal.data.max_damaged:
                raise ShardError(found.reason)
        raise ShardError(f"{reader.source}: all {len(reader)} clips of the split are damaged: expected some")


def _read_clip(
    readers: Sequence[ShardReader], lengths: Sequence[int], beyond: int, clip: tuple[int, int]
) -> ClipSample:
    bucket, index = clip
    return readers[bucket].read(index, lengths[bucket], beyond)
