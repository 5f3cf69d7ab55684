"""The loader: same clips for every layout and start, faults where they belong, and no thread left behind."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_shards import write_fake_shards
from helpers.shard_edits import locate
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.reader import ShardReader, ShardSet
from data_shards.schema import ClipSample, MachineError, ShardError
from dualforce.config import ConfigError, DataConfig
from dualforce.data.loader import StepLoader
from dualforce.data.statistics import StreamStatistics
from dualforce.data.steps import Deal
from dualforce.types import ClipBatch

CLIPS = 7


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(write_fake_shards(tmp_path_factory.mktemp("shards"), clips=CLIPS, frames=3, height=2, width=2))


class OpenedWith:
    """A set that gives another reader for every split."""

    def __init__(self, shards: ShardSet, reader: Any) -> None:
        self.source, self.hash, self._reader = shards.source, shards.hash, reader

    def split(self, name: str) -> Any:
        return self._reader


def loader(shards: ShardSet, reader: Any = None, start_step: int = 0, stop_step: int = 6, **changes: Any) -> StepLoader:
    data: dict[str, Any] = {"frames": 3, "clips_per_step": 12, "prefetch": 2, "max_damaged": 0}
    data.update({key: changes.pop(key) for key in list(changes) if key in data})
    known_keys = changes.pop("known", ())
    options = {"dp_rank": 0, "dp_size": 1, "micro_batch": 12, "seed": 3, "context": 2, **changes}
    deal = Deal(StreamStatistics.from_manifest(shards.manifest), DataConfig(**data), text_dim=4, **options)
    known = ((0, key) for key in known_keys)
    opened: Any = shards if reader is None else OpenedWith(shards, reader)
    return StepLoader([opened], deal, start_step, stop_step, lambda batches: batches, known)


def clips_of(batches: list[ClipBatch]) -> list[tuple[str, tuple[int, int]]]:
    return [pair for batch in batches for pair in zip(batch.keys, batch.position, strict=True)]


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "dualforce-read-ahead"]


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 6]), st.data())
def test_every_layout_and_start_deals_out_the_same_clips(shards: ShardSet, dp_size: int, data: st.DataObject) -> None:
    per_rank = 12 // dp_size
    micro_batch = data.draw(st.sampled_from([m for m in range(1, per_rank + 1) if per_rank % m == 0]))
    start = data.draw(st.integers(0, 3))
    whole = [clips_of(step) for step in loader(shards, stop_step=4)]
    ranks = [
        list(loader(shards, dp_rank=r, dp_size=dp_size, micro_batch=micro_batch, start_step=start, stop_step=4))
        for r in range(dp_size)
    ]
    for rank in ranks:
        assert all([len(batch.keys) for batch in step] == [micro_batch] * (per_rank // micro_batch) for step in rank)
    dealt = [[pair for step in steps for pair in clips_of(step)] for steps in zip(*ranks, strict=True)]
    assert dealt == whole[start:]


def test_each_clip_comes_once_per_epoch(shards: ShardSet) -> None:
    pairs = [pair for step in loader(shards, stop_step=7) for pair in clips_of(step)]  # 84 clips, 12 epochs
    for epoch in range(12):
        keys = [key for key, (number, _) in pairs if number == epoch]
        assert sorted(keys) == shards.split("train").keys
    assert len({tuple(key for key, (number, _) in pairs if number == epoch) for epoch in range(12)}) > 1


def test_resumed_equals_uninterrupted_bit_for_bit(shards: ShardSet) -> None:
    straight = list(loader(shards, stop_step=6))
    resumed = list(loader(shards, stop_step=3)) + list(loader(shards, start_step=3, stop_step=6))
    assert len(straight) == len(resumed) == 6
    for left, right in zip(straight, resumed, strict=True):
        for x, y in zip(left[0], right[0], strict=True):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y


def test_iterating_again_starts_again(shards: ShardSet) -> None:
    both = loader(shards)
    assert [clips_of(step) for step in both] == [clips_of(step) for step in both]
    assert [clips_of(step) for step in both] == [clips_of(both.step(number)) for number in range(6)]


class CountingReader(ShardReader):
    """Waits for a permit before each clip; `at(n)` is an event that the n-th reading sets."""

    def __init__(self, reader: ShardReader, permits: int = 10_000) -> None:
        super().__init__(reader.source, reader.manifest, reader._index, reader._clips)
        self.permits = threading.Semaphore(permits)
        self._reads: list[threading.Event] = [threading.Event() for _ in range(1000)]
        self._count = 0

    def at(self, number: int) -> threading.Event:
        return self._reads[number - 1]

    def read(self, index: int, frames: int | None = None, beyond: int = 0) -> ClipSample:
        self.permits.acquire()
        self._reads[self._count].set()
        self._count += 1
        return super().read(index, frames, beyond)


def test_reads_ahead_prefetch_steps_and_no_more(shards: ShardSet) -> None:
    reader = CountingReader(shards.split("train"))
    steps = loader(shards, reader=reader, clips_per_step=2, micro_batch=2, prefetch=3, stop_step=100)
    for _ in steps:
        assert reader.at(2 * (1 + 3)).wait(30)  # the step taken and three that wait
        assert not reader.at(2 * (1 + 3) + 1).wait(0.1)
        break


def test_wait_is_counted(shards: ShardSet) -> None:
    reader = CountingReader(shards.split("train"), permits=0)
    steps = loader(shards, reader=reader, clips_per_step=2, micro_batch=2, stop_step=2)
    timer = threading.Timer(0.05, lambda: reader.permits.release(100))
    timer.start()
    assert len(list(steps)) == 2
    timer.join()
    assert 0.02 < steps.wait_seconds < 30


def test_leaving_early_ends_the_thread(shards: ShardSet) -> None:
    for _ in loader(shards, stop_step=1000):
        assert len(readers()) == 1
        break
    assert readers() == []
    with pytest.raises(RuntimeError, match="training failed"):
        fail_at_first(loader(shards, stop_step=1000))
    assert readers() == []


def fail_at_first(steps: StepLoader) -> None:
    for _ in steps:
        steps.close()
        raise RuntimeError("training failed")


def test_close_ends_the_iteration(shards: ShardSet) -> None:
    steps = loader(shards, stop_step=1000)
    seen = 0
    for _ in steps:
        seen += 1
        steps.close()
        assert readers() == []
    assert seen == 1
    steps.close()


def test_a_damaged_clip_is_raised_after_the_steps_before_it(shards: ShardSet, tmp_path: Path) -> None:
    root = write_fake_shards(tmp_path, clips=CLIPS, frames=3, height=2, width=2)
    opened = ShardSet.open(root)
    order = [
        key for step in loader(opened, clips_per_step=1, micro_batch=1, stop_step=CLIPS) for key, _ in clips_of(step)
    ]
    clip = next(clip for clip in locate(root) if clip.key == order[4])
    data = bytearray((root / "train-000000.tar").read_bytes())
    data[clip.payload.offset + 300] ^= 4
    (root / "train-000000.tar").write_bytes(data)
    seen = []
    with pytest.raises(ShardError, match=rf"train-000000\.tar: sample '{order[4]}': .*damaged"):
        for step in loader(opened, clips_per_step=1, micro_batch=1, stop_step=CLIPS):
            seen += [key for key, _ in clips_of(step)]
    assert seen == order[:4]
    assert readers() == []


@pytest.mark.parametrize("context", [0, 2, 4, 9])
def test_a_crop_is_read_in_part_and_equals_that_of_the_whole(tmp_path: Path, context: int) -> None:
    """Of clips of nine frames the first five, and as much sound beyond them as the last window looks into."""
    opened = ShardSet.open(write_fake_shards(tmp_path, clips=CLIPS, frames=9, flame=True, text_dim=4))
    whole = Whole(opened.split("train"))
    made = [loader(opened, reader, frames=5, context=context, stop_step=1) for reader in (None, whole)]
    (part,), (full,) = (list(steps) for steps in made)
    assert whole.asked and all(ask[1] == 5 for ask in whole.asked)
    for name, value in part[0]._asdict().items():
        other = getattr(full[0], name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


class Whole:
    """A reader that always reads the whole clip, whatever it is asked for."""

    def __init__(self, reader: ShardReader) -> None:
        self.asked: list[tuple[int, ...]] = []
        self.source, self.frames, self.keys, self._reader = reader.source, reader.frames, reader.keys, reader
        self.manifest = reader.manifest

    def __len__(self) -> int:
        return len(self._reader)

    def read(self, *asked: int) -> ClipSample:
        self.asked.append(asked)
        return self._reader.read(asked[0])


class Faulty:
    """A reader that cannot read some clips."""

    def __init__(self, reader: ShardReader, bad: set[int]) -> None:
        self.bad, self.tried, self._reader = bad, [], reader
        self.source, self.frames, self.keys = reader.source, reader.frames, reader.keys
        self.manifest = reader.manifest

    def __len__(self) -> int:
        return len(self._reader)

    def key(self, index: int) -> str:
        return self.keys[index]

    def read(self, index: int, *args: Any, **kwargs: Any) -> ClipSample:
        self.tried.append(index)
        if index in self.bad:
            raise ShardError(f"train-000000.tar: sample {self.keys[index]!r}: video: damaged: expected whole")
        return self._reader.read(index, *args, **kwargs)


def read_with(shards: ShardSet, bad: set[int], dp_size: int) -> list[list[tuple[str, tuple[int, int]]]]:
    """Clips and places of three steps, dealt to `dp_size` ranks that cannot read the clips `bad`."""
    found: list[list[tuple[str, tuple[int, int]]]] = [[], [], []]
    met: set[str] = set()
    for rank in range(dp_size):
        reader = Faulty(shards.split("train"), bad)
        steps = loader(shards, reader, dp_rank=rank, dp_size=dp_size, micro_batch=1, stop_step=3, max_damaged=2)
        for number, batches in enumerate(steps):
            found[number] += clips_of(batches)
        met |= {one.key for one in steps.damaged}
        assert all("train-000000.tar: sample" in one.reason and 0 <= one.step < 3 for one in steps.damaged)
        assert all(reader.tried.count(index) <= 1 for index in bad)  # once known, never again
    assert met == {f"train-{index:04d}" for index in bad}
    return found


def test_damaged_clips_are_replaced_alike_in_every_layout(shards: ShardSet) -> None:
    whole, lost = read_with(shards, set(), 1), {"train-0001", "train-0004"}
    found = read_with(shards, {1, 4}, 1)
    assert found == read_with(shards, {1, 4}, 2) == read_with(shards, {1, 4}, 4)
    for step, other in zip(whole, found, strict=True):
        assert [place for _, place in step] == [place for _, place in other]  # noise is keyed by the place
        for (key, _), (new, _) in zip(step, other, strict=True):
            assert new == key if key not in lost else new not in lost


def test_one_damaged_clip_too_many_ends_the_iteration(shards: ShardSet) -> None:
    reader = Faulty(shards.split("train"), {0, 1, 2})
    steps = loader(shards, reader, max_damaged=2)
    with pytest.raises(ShardError, match=r"sample 'train-000\d': video: .*; 2 before it: .* data.max_damaged"):
        list(steps)
    assert len(steps.damaged) == 2


@pytest.mark.parametrize("fault", [errno.EMFILE, errno.ENOMEM, errno.ESTALE])
def test_a_fault_of_the_machine_replaces_no_clip(shards: ShardSet, monkeypatch: pytest.MonkeyPatch, fault: int) -> None:
    """Which other ranks do not have: they would train on other clips, and silently."""
    steps, original = loader(shards, max_damaged=5), os.open

    def short(path: Any, *flags: Any) -> int:
        if str(path).endswith(".tar"):
            raise OSError(fault, os.strerror(fault))
        return original(path, *flags)

    monkeypatch.setattr(os, "open", short)
    with pytest.raises(MachineError, match=r"train-000000\.tar: .*: expected a machine that can read it"):
        list(steps)
    assert steps.damaged == []


def test_clips_known_from_before_count_and_are_told_of(shards: ShardSet) -> None:
    """Told of, because ranks that share them must agree on them after a resume too."""
    reader = Faulty(shards.split("train"), {1, 4, 6})
    keys = [reader.keys[index] for index in (1, 4, 6)]
    whole = loader(shards, reader, max_damaged=3)
    assert len(list(whole)) == 6 and {one.key for one in whole.damaged} == set(keys)
    again = loader(shards, reader, max_damaged=3, known=keys)
    assert len(list(again)) == 6 and again.damaged == whole.damaged
    fewer = loader(shards, reader, max_damaged=3, known=["train-0002", keys[0]])
    with pytest.raises(ShardError, match=r"; 3 before it: .* data.max_damaged"):
        list(fewer)
    assert len({one.key for one in fewer.damaged} - {keys[0]}) == 1


def test_a_store_that_is_gone_is_not_read_through(shards: ShardSet) -> None:
    """One clip more than may be damaged is enough to know."""
    reader = Faulty(shards.split("train"), set(range(CLIPS)))
    with pytest.raises(ShardError, match="2 before it"):
        list(loader(shards, reader, max_damaged=2))
    assert len(reader.tried) == 3


def test_nothing_left_to_read(shards: ShardSet) -> None:
    with pytest.raises(ShardError, match="all 7 clips of the split are damaged"):
        list(loader(shards, Faulty(shards.split("train"), set(range(CLIPS))), max_damaged=99))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"frames": 5}, "data.frames: 5: expected at most 3, "),
        ({"dp_size": 5}, "data.clips_per_step: 12: expected a multiple of 5"),
        ({"micro_batch": 5}, "micro-batch 5: expected a divisor of the 12"),
        ({"dp_size": 2, "dp_rank": 2}, "rank 2 of 2"),
    ],
)
def test_sizes_that_cannot_work(shards: ShardSet, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loader(shards, **changes)
    assert named in str(caught.value)


def test_a_split_without_clips(tmp_path: Path) -> None:
    opened = ShardSet.open(write_fake_shards(tmp_path, clips=2, validation_clips=0))
    with pytest.raises(ConfigError, match="0 clips in the split"):
        loader(opened, reader=opened.split("validation"))
