"""Clips a second from a web server, clean and with faults, in one run.

    python -m tools.bench_remote SHARDS [--rate 0.3] [--latency 0.03] [--clips 300] [--rounds 3] [--json FILE]

The server is a process of its own on this machine that answers every request after `--latency` seconds, as an object
store far away does. With faults, `--rate` of all requests fail, in equal parts as 500, 503, 429, a closed connection,
no answer, a stall in the middle (both until the client gives up), a short body, a wrong length, changed bytes under the
same ETag and under another, and the whole file in place of a part. Nothing is kept in the cache, and the options are
those of training. Every clip is compared with the local one. Rows take turns; time is by the clock.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import random
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

from data_shards.reader import ShardReader, ShardSet
from data_shards.remote.source import locate
from data_shards.schema import ClipSample, ShardError
from dualforce.data.ahead import ReadAhead
from tools.bench.fault_server import no_fault, random_faults, serving
from tools.bench.table import show, write_json

STALL = 3600.0  # seconds that a stalled answer would take: longer than any client waits
NOTHING_KEPT = 1  # bytes of the cache


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="tools.bench_remote", description=__doc__.split("\n")[0])
    made.add_argument("shards", type=Path, help="folder of the set that is served")
    made.add_argument("--rate", type=float, default=0.3, help="share of the requests that fail")
    made.add_argument("--latency", type=float, default=0.03, help="seconds before every answer")
    made.add_argument("--clips", type=int, default=300, help="of each row in each round")
    made.add_argument("--rounds", type=int, default=3, help="how often; rows are medians")
    made.add_argument("--frames", type=int, help="latent frames of the parts (default: whole clips)")
    made.add_argument("--at-once", type=int, nargs="+", default=[1, 8], help="clips read at a time; training reads 8")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", type=Path, help="file for the rows")
    return made


def main() -> None:
    """Measure and print. Exit code 1 for a wrong sample, 2 and one line for a wrong input."""
    options = parser().parse_args()
    try:
        rows = measure(options)
    except ShardError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    title = f"{options.shards}: clips by http, latency {options.latency} s, {options.rate:.0%} of requests fail"
    print(show(title, rows))
    if options.json:
        write_json(options.json, {"shards": str(options.shards), "rows": rows})
    if any(row["wrong"] for row in rows):
        raise SystemExit(1)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of clean and faulty servers for each number of clips at a time."""
    if not 0 <= options.rate < 1:
        raise ShardError(f"--rate {options.rate}: expected a share from 0 to below 1")
    local = ShardSet.open(options.shards).split("train")
    cases = [(faulty, count) for count in options.at_once for faulty in (False, True)]
    found: dict[tuple[bool, int], list[dict[str, float]]] = {case: [] for case in cases}
    with tempfile.TemporaryDirectory() as cache:
        for number, case in itertools.product(range(options.rounds), cases):
            found[case].append(_round(options, local, Path(cache), case, options.seed + number))
    rows = [_row(*case, found[case]) for case in cases]
    for clean, faulty in zip(rows[::2], rows[1::2], strict=True):
        clean["of clean"], faulty["of clean"] = 1.0, faulty["clips a second"] / clean["clips a second"]
    return rows


def _row(faulty: bool, count: int, rounds: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "server": "faulty" if faulty else "clean",
        "at once": count,
        "clips a second": median(one["rate"] for one in rounds),
        "slowest s": max(one["slowest"] for one in rounds),
        "requests": int(sum(one["requests"] for one in rounds)),
        "faults": int(sum(one["faults"] for one in rounds)),
        "clips": int(sum(one["clips"] for one in rounds)),
        "wrong": int(sum(one["wrong"] for one in rounds)),
    }


def _round(
    options: argparse.Namespace, local: ShardReader, cache: Path, case: tuple[bool, int], seed: int
) -> dict[str, float]:
    faulty, count = case
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    rate = options.rate if faulty else 0.0
    server = context.Process(target=_serve, args=(options.shards, rate, options.latency, seed, theirs), daemon=True)
    server.start()
    theirs.close()
    try:
        url = ours.recv()
        reader = ShardSet.open(locate(url, cache, NOTHING_KEPT)).split("train")
        dice = random.Random(seed)
        order = [dice.randrange(len(reader)) for _ in range(options.clips)]
        taken = _read(reader, order, count, options.frames)
        ours.send(None)
        requests, faults = ours.recv()
    finally:
        ours.close()
        server.join(10)
        if server.is_alive():
            server.kill()
    wrong = sum(not _same(clip, local.read(index, options.frames)) for index, clip in taken["clips"])
    return {**taken["times"], "requests": requests, "faults": faults, "clips": len(order), "wrong": wrong}


def _read(reader: ShardReader, order: list[int], count: int, frames: int | None) -> dict[str, Any]:
    """The clips are compared afterwards, so that this takes no time of theirs."""
    ahead: ReadAhead[int, ClipSample] = ReadAhead(lambda index: reader.read(index, frames), count)
    ahead.expect(order)
    kept, slowest, began = [], 0.0, time.perf_counter()
    for index in order:
        start = time.perf_counter()
        kept.append((index, ahead.take(index)))
        slowest = max(slowest, time.perf_counter() - start)
    seconds = time.perf_counter() - began
    return {"times": {"rate": len(order) / seconds, "slowest": slowest}, "clips": kept}


def _same(one: ClipSample, other: ClipSample) -> bool:
    ours, theirs = one.tensors(), other.tensors()
    return one.key == other.key and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _serve(root: Path, rate: float, latency: float, seed: int, pipe: Connection) -> None:
    with serving(root, random_faults(rate, seed) if rate else no_fault, STALL) as server:
        server.latency = latency
        pipe.send(server.url)
        try:
            pipe.recv()
            pipe.send((len(server.requests), sum(server.hits.values())))
        except EOFError:
            return


if __name__ == "__main__":
    main()
