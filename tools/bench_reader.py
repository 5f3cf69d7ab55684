"""Clips a second of the project's reader and of plain webdataset, from the same tars, one thread, in one run; and the
time from opening a large set to its first batch.

    python -m tools.bench_reader SHARDS [--frames 5 13 21] [--batch 8] [--seconds 1] [--rounds 5] [--json FILE]
    python -m tools.bench_reader FOLDER --open [--tars 1000] [--clips 350] [--json FILE]

The project reads clips in a random order of the whole split and checks every byte it reads; the values of a clip only
at its first reading, which has a row of its own. `--frames` are the latent frames of the parts. webdataset reads tar
after tar, shuffles in a buffer of as many clips as the split has (the same order of randomness), decodes the same
tensors and cuts them; it checks nothing. The rows of batches go on to what a trainer takes: `--batch` clips at a time,
windows of sound cut, stacked and normalised. Each row is a process of its own, and they take turns, so that what else
the machine does meets all alike; time of the processor is counted, and of the clock.

`--open` makes a set in FOLDER if there is none, with the parts of the real writer, from one small clip under many keys.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
import webdataset
from safetensors.torch import load as decode_tensors
from torch import Tensor

from data_shards.reader import ShardSet
from data_shards.schema import TIME_FIELDS, ShardError
from tools.bench import training_batches
from tools.bench.first_batch import first_batch_rows
from tools.bench.table import show, write_json
from tools.bench.training_batches import statistics_of

OURS, FIRST, THEIRS = "ours", "ours, first time", "webdataset"
BATCHES = ", batches"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="tools.bench_reader", description=__doc__.split("\n")[0])
    made.add_argument("shards", type=Path)
    made.add_argument("--frames", type=int, nargs="+", help="latent frames of the parts (default: 5, 13 and all)")
    made.add_argument("--batch", type=int, default=8, help="clips of a batch")
    made.add_argument("--seconds", type=float, default=1.0, help="how long each row is timed in each round")
    made.add_argument("--rounds", type=int, default=5, help="how often; rows are medians")
    made.add_argument("--open", action="store_true", help="the time to the first batch of a large set")
    made.add_argument("--tars", type=int, default=1000, help="of the large set")
    made.add_argument("--clips", type=int, default=350, help="of each of its tars")
    made.add_argument("--json", type=Path, help="file for the rows")
    return made


def main() -> None:
    """Measure and print. Exit code 2 and one line for a wrong input."""
    options = parser().parse_args()
    try:
        if options.open:
            title = f"{options.shards}: {options.tars} tars of {options.clips} clips"
            rows = first_batch_rows(options.shards, options.tars, options.clips)
        else:
            title, rows = _reading(options)
    except ShardError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(show(title, rows))
    if options.json:
        write_json(options.json, {"shards": str(options.shards), "rows": rows})


def _reading(options: argparse.Namespace) -> tuple[str, list[dict[str, Any]]]:
    reader = ShardSet.open(options.shards).split("train")
    frames = options.frames or sorted({min(5, reader.frames), min(13, reader.frames), reader.frames})
    for count in frames:
        if not 1 <= count <= reader.frames:
            raise ShardError(f"--frames {count}: expected 1 to {reader.frames}, the frames of the clips")
    if options.batch < 1:
        raise ShardError(f"--batch {options.batch}: expected at least 1")
    cases = [(name, count) for count in frames for name in _READ]
    workers = [_Worker(name, options.shards, count, options.batch) for name, count in cases]
    try:
        rounds = [[worker.measure(options.seconds) for worker in workers] for _ in range(options.rounds)]
    finally:
        for worker in workers:
            worker.close()
    rows = [_row(*case, [one[number] for one in rounds]) for number, case in enumerate(cases)]
    taken = {(row["row"], row["frames"]): row["cpu ms a clip"] for row in rows}
    for row in rows:
        beside = THEIRS + BATCHES * row["row"].endswith(BATCHES)
        row["of webdataset"] = taken[beside, row["frames"]] / row["cpu ms a clip"]
    return f"{options.shards}: {len(reader)} clips of {reader.frames} latent frames, one thread", rows


def _row(name: str, frames: int, found: list[dict[str, float]]) -> dict[str, Any]:
    middle = {key: median(one[key] for one in found) for key in found[0]}
    cpu, clock = middle["cpu"], middle["clock"]
    return {"row": name, "frames": frames, "clips a cpu second": 1 / cpu, "cpu ms a clip": 1000 * cpu,
            "clock ms a clip": 1000 * clock, "resident MB": middle["resident MB"]}  # fmt: skip


Epoch = Callable[[], Iterator[Any]]


class _Worker:
    """A process that reads clips when it is told to."""

    def __init__(self, name: str, shards: Path, frames: int, batch: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(name, shards, frames, batch, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def measure(self, seconds: float) -> dict[str, float]:
        self._ours.send(seconds)
        found: dict[str, float] = self._ours.recv()
        return found

    def close(self) -> None:
        self._ours.send(None)
        self._process.join()


def _work(name: str, shards: Path, frames: int, batch: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    epoch = _READ[name](shards, frames, batch)
    clips = len(ShardSet.open(shards).split("train"))
    for _ in epoch():  # a first pass brings the tars into memory
        pass
    while (seconds := pipe.recv()) is not None:
        pipe.send(_measure(epoch, clips, seconds))


def _measure(epoch: Epoch, clips: int, seconds: float) -> dict[str, float]:
    """Seconds a clip of this process' processor and of the clock, and the most memory that was ever resident."""
    count, clock, cpu = 0, time.perf_counter(), time.process_time()
    while not count or time.perf_counter() - clock < seconds:
        for _ in epoch():
            pass
        count += clips
    cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"cpu": cpu / count, "clock": clock / count, "resident MB": resident}


def read_ours(shards: Path, frames: int, batch: int = 0, first: bool = False) -> Epoch:
    """One pass over the train split, at random; the tensors of each clip by name, or batches of `batch` clips. `first`:
    with a reader that has not read the clips before."""
    opened = ShardSet.open(shards)
    known, statistics = opened.split("train"), statistics_of(shards)

    def epoch() -> Iterator[Any]:
        reader = opened.split("train") if first else known
        order = random.sample(range(len(reader)), len(reader))
        if batch:
            yield from training_batches.ours(reader, statistics, order, frames, batch)
        for index in () if batch else order:
            yield reader.read(index, frames).tensors()

    return epoch


def read_webdataset(shards: Path, frames: int, batch: int = 0) -> Epoch:
    """The same tensors of the same clips."""
    opened = ShardSet.open(shards)
    tars = [str(shards / name) for name in opened.manifest["splits"]["train"]["shards"]]
    count, statistics = len(opened.split("train")), statistics_of(shards)

    def decode(clip: dict[str, Any]) -> dict[str, Tensor]:
        json.loads(clip["json"])
        tensors = decode_tensors(clip["safetensors"])
        if batch:  # windows of sound look beyond the cut
            return tensors
        return {name: value[:frames] if name in TIME_FIELDS else value for name, value in tensors.items()}

    def epoch() -> Iterator[Any]:
        shuffled = webdataset.WebDataset(tars, shardshuffle=len(tars) if len(tars) > 1 else False).shuffle(count)
        clips = shuffled.map(decode)
        yield from training_batches.theirs(clips, statistics, frames, batch) if batch else clips

    return epoch


_READ: dict[str, Callable[[Path, int, int], Epoch]] = {
    OURS: lambda shards, frames, batch: read_ours(shards, frames),
    FIRST: lambda shards, frames, batch: read_ours(shards, frames, first=True),
    THEIRS: lambda shards, frames, batch: read_webdataset(shards, frames),
    OURS + BATCHES: read_ours,
    FIRST + BATCHES: lambda shards, frames, batch: read_ours(shards, frames, batch, first=True),
    THEIRS + BATCHES: read_webdataset,
}

if __name__ == "__main__":
    main()
