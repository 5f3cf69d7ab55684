"""Clips a second of the project's reader and of plain webdataset, from the same tars, one thread, in one run.

    python -m tools.bench_reader SHARDS [--frames 13] [--seconds 3] [--json FILE]

The project reads clips in a random order of the whole split and checks every byte it reads; `--frames` reads that many
latent frames of each. webdataset reads tar after tar, shuffles in a buffer of as many clips as the split has (the same
order of randomness), decodes the tensors and cuts them; it checks nothing. Each row is a process of its own.
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
from pathlib import Path
from typing import Any

import torch
import webdataset
from safetensors.torch import load as decode_tensors

from data_shards.reader import ShardSet
from data_shards.schema import ShardError
from tools.bench.table import show, write_json

ROWS = ("ours", "ours, part", "webdataset")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="tools.bench_reader", description=__doc__.split("\n")[0])
    made.add_argument("shards", type=Path)
    made.add_argument("--frames", type=int, default=13, help="latent frames of the part that a run trains on")
    made.add_argument("--seconds", type=float, default=3.0, help="how long each row is timed")
    made.add_argument("--json", type=Path, help="file for the rows")
    return made


def main() -> None:
    """Measure and print. Exit code 2 and one line for a wrong input."""
    options = parser().parse_args()
    try:
        reader = ShardSet.open(options.shards).split("train")
        if not 1 <= options.frames <= reader.frames:
            raise ShardError(f"--frames {options.frames}: expected 1 to {reader.frames}, the frames of the clips")
    except ShardError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    rows: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    for name in ROWS:
        with context.Pool(1) as pool:
            rows.append(pool.apply(measure, (name, options.shards, options.frames, options.seconds)))
    for row in rows:
        row["of webdataset"] = row["clips/s"] / rows[-1]["clips/s"]
    title = f"{options.shards}: {len(reader)} clips of {reader.frames} latent frames, parts of {options.frames}"
    print(show(title, rows))
    if options.json:
        write_json(options.json, {"shards": str(options.shards), "frames": options.frames, "rows": rows})


def measure(name: str, shards: Path, frames: int, seconds: float) -> dict[str, Any]:
    """One row: clips a second after a first pass that brings the tars into memory, and the most resident memory."""
    torch.set_num_threads(1)
    source = _webdataset if name == "webdataset" else _ours
    made = source(shards, frames if name != "ours" else None)
    for _ in made():
        pass
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        count += sum(1 for _ in made())
    spent = time.perf_counter() - began
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"row": name, "clips/s": count / spent, "ms a clip": 1000 * spent / count, "resident MB": resident}


Epoch = Callable[[], Iterator[object]]


def _ours(shards: Path, frames: int | None) -> Epoch:
    reader = ShardSet.open(shards).split("train")

    def epoch() -> Iterator[object]:
        order = list(range(len(reader)))
        random.shuffle(order)
        for index in order:
            yield reader.read(index) if frames is None else reader.read(index, frames=frames)

    return epoch


def _webdataset(shards: Path, frames: int | None) -> Epoch:
    opened = ShardSet.open(shards)
    tars = [str(shards / name) for name in opened.manifest["splits"]["train"]["shards"]]
    count = len(opened.split("train"))

    def epoch() -> Iterator[object]:
        clips = webdataset.WebDataset(tars, shardshuffle=len(tars) if len(tars) > 1 else False).shuffle(count)
        for clip in clips:
            json.loads(clip["json"])
            tensors = decode_tensors(clip["safetensors"])
            yield {name: value[:frames] for name, value in tensors.items() if name != "reference"}

    return epoch


if __name__ == "__main__":
    main()
