"""Ranks as processes that read a shard set through the real loader, with real loader processes below them.

`run` starts the ranks of a layout and gives back what each has read; a rank may kill itself on the way.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from torch import Tensor

from data_shards.reader import ShardSet
from dualforce.config import DataConfig
from dualforce.data.loader import StepLoader
from dualforce.data.statistics import StreamStatistics
from dualforce.data.steps import Deal
from dualforce.types import ClipBatch

Clip = tuple[str, int, int, str]  # key, epoch, position, digest of all its tensors
MARK = "DUALFORCE_TEST_RANK"


@dataclass(frozen=True)
class Layout:
    """Data-parallel ranks, ranks that share a clip, loader processes of each."""

    dp: int
    sp: int
    workers: int


@dataclass(frozen=True)
class Segment:
    """A part of a run: the steps `start` to `stop` - 1. With `killed`, the last rank dies after that many steps."""

    root: Path
    layout: Layout
    clips_per_step: int
    start: int
    stop: int
    killed: int | None = None


def clips_of(batches: list[ClipBatch]) -> list[Clip]:
    """The clips of a rank's micro-batches, in order."""
    found = []
    for batch in batches:
        for i, (key, (epoch, position)) in enumerate(zip(batch.keys, batch.position, strict=True)):
            digest = hashlib.sha256()
            for name, value in batch._asdict().items():
                if isinstance(value, Tensor):
                    digest.update(f"{name} {value.dtype} {list(value.shape[1:])}".encode())
                    digest.update(value[i].contiguous().numpy().tobytes())
            found.append((key, epoch, position, digest.hexdigest()))
    return found


def loader_of(segment: Segment, rank: int) -> StepLoader[list[Clip]]:
    """The loader of one rank: a small micro-batch, everything else as training does it."""
    layout, shards = segment.layout, ShardSet.open(segment.root)
    data = DataConfig(frames=3, clips_per_step=segment.clips_per_step, prefetch=2, workers=layout.workers)
    deal = Deal(
        StreamStatistics.from_manifest(shards.manifest), data, context=2, text_dim=4, seed=3,
        dp_rank=rank // layout.sp, dp_size=layout.dp, micro_batch=1,
    )  # fmt: skip
    return StepLoader([shards], deal, segment.start, segment.stop, clips_of)


def run(segment: Segment, folder: Path) -> list[list[list[Clip]]]:
    """Per rank and step, the clips. Where a rank was killed, the others are killed too, as a launcher does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    layout = segment.layout
    files = [folder / f"rank-{rank}.jsonl" for rank in range(layout.dp * layout.sp)]
    ranks = [context.Process(target=_rank, args=(segment, rank, file)) for rank, file in enumerate(files)]
    for process in ranks:
        process.start()
    try:
        _wait(ranks, segment)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return [_read(file) for file in files]


def marked(mark: str) -> list[int]:
    """Processes that were started with `mark` in their environment, or forked from one that was."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"{MARK}={mark}\0".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has ended, or is another user's
            continue
    return found


def gone(mark: str, seconds: float = 30.0) -> bool:
    """Whether all processes with `mark` end within some time."""
    end = time.monotonic() + seconds
    while marked(mark):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _wait(ranks: list[BaseProcess], segment: Segment) -> None:
    if segment.killed is None:
        for process in ranks:
            process.join(300)
            if process.exitcode != 0:
                raise AssertionError(f"{segment}: a rank ended with {process.exitcode}")
    else:
        ranks[-1].join(300)
        if ranks[-1].exitcode != -signal.SIGKILL:
            raise AssertionError(f"{segment}: expected the last rank to die, it ended with {ranks[-1].exitcode}")


def _rank(segment: Segment, rank: int, path: Path) -> None:
    os.environ[MARK] = path.parent.name
    dies = segment.killed is not None and rank == segment.layout.dp * segment.layout.sp - 1
    with path.open("w", encoding="utf-8") as file:
        for number, clips in enumerate(loader_of(segment, rank), start=1):
            file.write(json.dumps(clips) + "\n")
            file.flush()
            if dies and number == segment.killed:
                os.kill(os.getpid(), signal.SIGKILL)


def _read(path: Path) -> list[list[Clip]]:
    """A rank that was killed before it began has no file, and a last line may have been cut off."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [[(key, epoch, position, digest) for key, epoch, position, digest in json.loads(line)] for line in lines]
