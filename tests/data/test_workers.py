"""Loader processes: the same clips with the same bytes as without, faults as without, and nothing left behind."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_shards import write_fake_shards
from helpers.loader_ranks import Clip, Layout, Segment, clips_of, gone, loader_of, marked, run
from helpers.shard_edits import locate

from data_shards.reader import ShardSet
from data_shards.schema import ShardError
from dualforce.config import DataConfig
from dualforce.data import workers
from dualforce.data.handover import hand_over, taken
from dualforce.data.loader import StepLoader
from dualforce.data.order import permutation
from dualforce.data.statistics import StreamStatistics
from dualforce.data.steps import Damaged, Deal
from dualforce.data.workers import LoaderError
from dualforce.types import ClipBatch

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")

CLIPS, PER_STEP = 13, 24
SEED = 3  # of loader_of


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_shards(tmp_path_factory.mktemp("shards"), clips=CLIPS, frames=3, height=2, width=2, flame=True)


def loader(root: Path, count: int, **changes: Any) -> StepLoader[list[ClipBatch]]:
    """One rank's six steps of twelve clips."""
    shards = ShardSet.open(root)
    data: dict[str, Any] = {"frames": 3, "clips_per_step": 12, "prefetch": 2, "workers": count}
    start, stop = changes.pop("start", 0), changes.pop("stop", 6)
    statistics = StreamStatistics.from_manifest(shards.manifest)
    deal = Deal(statistics, DataConfig(**{**data, **changes}), 2, 4, SEED, dp_rank=0, dp_size=1, micro_batch=4)
    return StepLoader([shards], deal, start, stop, lambda batches: batches)


def loaders() -> list[Any]:
    return [process for process in multiprocessing.active_children() if process.name.startswith("dualforce-loader")]


def damage(root: Path, numbers: list[int]) -> Path:
    """Flip a bit in the latents of these clips."""
    clips = locate(root)
    data = bytearray((root / "train-000000.tar").read_bytes())
    for number in numbers:
        data[clips[number].tensors["video"].offset + 5] ^= 4
    (root / "train-000000.tar").write_bytes(data)
    return root


@pytest.mark.parametrize("count", [1, 3])
def test_the_same_steps_with_the_same_bytes(root: Path, count: int) -> None:
    """More processes than steps that are wanted ahead, and fewer; a second iteration starts again."""
    whole, steps = list(loader(root, 0)), loader(root, count)
    for _ in range(2 if count == 1 else 1):
        for left, right in zip(whole, steps, strict=True):
            for one, other in zip(left, right, strict=True):
                assert one.keys == other.keys and one.position == other.position
                for name, value in one._asdict().items():
                    if isinstance(value, torch.Tensor):
                        assert torch.equal(value, getattr(other, name)), name
                        assert value.dtype == getattr(other, name).dtype and value.shape == getattr(other, name).shape
        assert not loaders()


def test_steps_from_any_start(root: Path) -> None:
    whole = [clips_of(step) for step in loader(root, 0)]
    assert [clips_of(step) for step in loader(root, 2, start=3)] == whole[3:]
    assert list(loader(root, 2, start=6)) == []


def test_a_handover_is_one_copy_of_everything() -> None:
    """Shapes of any size, so also tensors that end off the boundary of the next."""
    numbers = iter(range(1000))
    batches = [
        ClipBatch(
            *(torch.full((1, 1 + i), float(next(numbers))) for i in range(4)), torch.tensor([[True, False, True]]),
            torch.zeros(1, 0, dtype=torch.bool), *(torch.rand(1, 3, 5 + i).half() for i in range(2)),
            torch.ones(1, 7, dtype=torch.bool), keys=(f"k{clip}",), position=((clip, 2),),
        ) for clip in range(2)
    ]  # fmt: skip
    handed = hand_over(batches)
    assert handed.memory.is_shared() and not handed.memory.is_pinned()
    for left, right in zip(batches, taken(handed), strict=True):
        for one, other in zip(left, right, strict=True):
            same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other  # type: ignore[arg-type]
            assert same and getattr(one, "dtype", None) == getattr(other, "dtype", None)
    batches[0].video.fill_(-1)
    assert not torch.equal(taken(handed)[0].video, batches[0].video)


def read_all(steps: StepLoader[list[ClipBatch]]) -> tuple[list[list[Clip]], list[Damaged], str | None]:
    """Steps until the end or a fault, the damage, and the fault."""
    found: list[list[Clip]] = []
    try:
        for step in steps:
            found.append(clips_of(step))
    except ShardError as error:
        return found, steps.damaged, str(error)
    return found, steps.damaged, None


@pytest.mark.parametrize(("most", "count"), [(3, 3), (2, 2), (0, 1)])
def test_damage_is_replaced_counted_and_told_alike(tmp_path: Path, most: int, count: int) -> None:
    """Three damaged clips, two of them neighbours in the order, met by several processes: as one thread would."""
    shards = ShardSet.open(write_fake_shards(tmp_path, clips=CLIPS, frames=3, height=2, width=2))
    order = permutation(shards.hash, SEED, 1, CLIPS).tolist()  # clips 13 to 25: steps 1 and 2, so two processes
    damage(tmp_path, [order[2], order[3], order[-1]])
    alone = read_all(loader(tmp_path, 0, max_damaged=most))
    assert (alone[2] is None) == (most == 3) and len(alone[1]) == most
    assert read_all(loader(tmp_path, count, max_damaged=most)) == alone
    if most == 2:
        assert "; 2 before it: expected no more than data.max_damaged" in str(alone[2])
    if most == 3:
        assert [len(step) for step in alone[0]] == [12] * 6
        assert {(one.shard, one.member) for one in alone[1]} == {("train-000000.tar", "video")}
        assert len({one.key for one in alone[1]}) == 3 and min(one.step for one in alone[1]) == 0
    assert not loaders()


def test_the_limit_counts_clips_that_different_processes_met(tmp_path: Path) -> None:
    """Each process meets one damaged clip, which alone would be within the limit."""
    shards = ShardSet.open(write_fake_shards(tmp_path, clips=24, frames=3, height=2, width=2))
    order = permutation(shards.hash, SEED, 0, 24).tolist()
    damage(tmp_path, [order[5], order[17]])
    steps = loader(tmp_path, 2, max_damaged=1, stop=2)
    found, damaged, fault = read_all(steps)
    assert len(found) == 1 and [one.step for one in damaged] == [0]
    assert f"sample 'train-{order[17]:04d}'" in str(fault) and "; 1 before it" in str(fault)


def test_a_set_that_is_no_longer_the_same_is_refused(tmp_path: Path) -> None:
    one, other = (
        write_fake_shards(tmp_path / str(seed), clips=CLIPS, frames=3, height=2, width=2, seed=seed) for seed in (0, 1)
    )
    steps, old, new = loader(one, 1), ShardSet.open(one).hash, ShardSet.open(other).hash
    shutil.copytree(other, one, dirs_exist_ok=True)
    with pytest.raises(ShardError, match=f"hash {new}: expected {old}") as error:
        list(steps)
    assert "\n" not in str(error.value) and not loaders()


def test_a_killed_process_is_one_error_after_the_steps_before_it(root: Path) -> None:
    seen = []
    with pytest.raises(LoaderError) as error:
        for step in loader(root, 3, stop=1000):
            seen.append(clips_of(step))
            if len(seen) == 4:
                victim = next(process for process in loaders() if process.name.endswith("-1"))
                os.kill(victim.pid, signal.SIGKILL)
    text = str(error.value)
    assert f"loader process 2 of 3 (pid {victim.pid}) ended by SIGKILL" in text and "\n" not in text, text
    assert "data.workers" in text and "--resume" in text
    assert seen == [clips_of(step) for step in loader(root, 0, stop=len(seen))] and len(seen) < 20
    assert not loaders()


def test_an_exception_in_a_process_is_one_error(root: Path) -> None:
    """Anything but a damaged clip: a fault of the program, whose traceback the process itself has shown."""
    steps = loader(root, 1)
    object.__setattr__(steps._deal, "context", -1)  # the thread's own reader was made before
    with pytest.raises(LoaderError, match=r"loader process 1 of 1 \(pid \d+\) ended by exit code 1 \(its traceback is"):
        list(steps)
    assert not loaders()


def test_leaving_early_ends_the_processes(root: Path) -> None:
    for number, _ in enumerate(loader(root, 3, stop=1000)):
        assert len(loaders()) == 3
        if number == 3:  # each has given a step
            for process in loaders():
                os.kill(process.pid, signal.SIGINT)  # Ctrl-C goes to all of them, and the trainer decides
        if number == 9:
            break
    assert not loaders()
    with pytest.raises(RuntimeError, match="training failed"):
        for _ in loader(root, 2, stop=1000):
            raise RuntimeError("training failed")
    assert not loaders()


def test_close_does_not_wait_for_a_process_that_hangs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LEAVE_SECONDS", 0.3)
    steps = loader(root, 1, stop=1000)
    began = time.monotonic()
    for _ in steps:
        os.kill(loaders()[0].pid, signal.SIGSTOP)
        closing = threading.Timer(0.2, steps.close)
        closing.start()  # while the consumer waits for a step that does not come
    closing.join()
    assert time.monotonic() - began < 30 and not loaders()


def test_close_does_not_wait_for_a_process_that_hangs_in_the_middle_of_a_step(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that has come is shared memory, for which the process is asked again."""
    monkeypatch.setattr(workers, "LEAVE_SECONDS", 0.3)
    receive, stopped = Connection.recv, threading.Event()

    def late(pipe: Connection) -> object:
        os.kill(loaders()[0].pid, signal.SIGSTOP)
        stopped.set()
        return receive(pipe)

    steps = loader(root, 1, stop=1000)
    closing = threading.Thread(target=lambda: (stopped.wait(), time.sleep(0.2), steps.close()))
    closing.start()
    with monkeypatch.context() as patch:
        patch.setattr(Connection, "recv", late)
        assert not list(steps)
        closing.join()
    assert not loaders()


def test_processes_of_a_killed_trainer_end(root: Path, tmp_path: Path) -> None:
    """Also the server that forks them; while they read, and while they wait."""
    context = multiprocessing.get_context("forkserver")
    segment = Segment(root, Layout(1, 1, 2), PER_STEP, 0, 10_000)
    trainer = context.Process(target=_endless, args=(segment, tmp_path.name))
    trainer.start()
    end = time.monotonic() + 60
    while len(marked(tmp_path.name)) < 3:  # the server and two processes
        assert time.monotonic() < end
        time.sleep(0.05)
    trainer.kill()
    trainer.join()
    assert trainer.exitcode == -signal.SIGKILL
    assert gone(tmp_path.name)


def _endless(segment: Segment, mark: str) -> None:
    os.environ["DUALFORCE_TEST_RANK"] = mark
    for _ in loader_of(segment, 0):
        time.sleep(0.01)


def resumed(root: Path, folder: Path, parts: list[tuple[Layout, int, int | None]], every: int = 2) -> list[list[Clip]]:
    """Steps of a run in parts (layout, steps in all, step of the part at which a rank dies), each going on at the last
    multiple of `every` steps that all its ranks had done, where a checkpoint would be."""
    steps: list[list[Clip]] = []
    for number, (layout, stop, killed) in enumerate(parts):
        place = folder / f"{folder.name}-{number}"
        place.mkdir()
        ranks = run(Segment(root, layout, PER_STEP, len(steps), stop, killed), place)
        for first in range(0, len(ranks), layout.sp):
            shortest = min(len(ranks[first + other]) for other in range(layout.sp))
            assert all(ranks[first + other][:shortest] == ranks[first][:shortest] for other in range(layout.sp))
        done = min(len(read) for read in ranks)
        if killed is None:
            assert all(len(read) == stop - len(steps) for read in ranks)
        else:
            done = (len(steps) + done) // every * every - len(steps)
        steps += [[clip for read in ranks[:: layout.sp] for clip in read[step]] for step in range(max(done, 0))]
        assert gone(place.name)
    return steps


CASES: list[list[tuple[Layout, int, int | None]]] = [
    [(Layout(2, 1, 1), 6, 4), (Layout(1, 1, 3), 6, None)],
    [(Layout(1, 2, 0), 5, 3), (Layout(3, 1, 0), 6, None)],
]
SLOW: list[list[tuple[Layout, int, int | None]]] = [
    [(Layout(1, 1, 0), 6, None)],
    [(Layout(1, 1, 4), 6, None)],
    [(Layout(1, 4, 1), 6, 5), (Layout(4, 1, 1), 6, None)],
    [(Layout(4, 1, 4), 6, 3), (Layout(2, 2, 1), 6, None)],
    [(Layout(3, 2, 0), 4, None), (Layout(2, 1, 4), 6, 1), (Layout(1, 1, 1), 6, None)],
    [(Layout(8, 1, 1), 6, 4), (Layout(4, 2, 0), 6, None)],
    [(Layout(8, 1, 0), 3, None), (Layout(8, 1, 4), 6, None)],
    [(Layout(2, 4, 1), 6, 2), (Layout(8, 1, 0), 6, None)],
    [(Layout(4, 4, 0), 6, 3), (Layout(1, 2, 4), 6, 2), (Layout(3, 1, 4), 6, None)],
    [(Layout(2, 2, 4), 6, 5), (Layout(2, 2, 4), 6, None)],
    [(Layout(1, 2, 0), 5, 3), (Layout(3, 1, 1), 6, None)],
    [(Layout(3, 4, 1), 6, None)],
    [(Layout(8, 4, 0), 6, None)],
]


@pytest.mark.parametrize("parts", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_no_kill_and_no_layout_changes_what_is_read(
    root: Path, tmp_path: Path, parts: list[tuple[Layout, int, int | None]]
) -> None:
    """Real ranks with real loader processes: every clip once an epoch, in the one order, with the same bytes."""
    found = resumed(root, tmp_path, parts)
    assert found == [clips_of(step) for step in loader(root, 0, clips_per_step=PER_STEP)]
    run_long = [clip for step in found for clip in step]
    order = [(epoch, position) for epoch in range(len(run_long) // CLIPS + 1) for position in range(CLIPS)]
    assert [clip[1:3] for clip in run_long] == order[: len(run_long)]
    for epoch in range(len(run_long) // CLIPS):
        assert len({clip[0] for clip in run_long if clip[1] == epoch}) == CLIPS
