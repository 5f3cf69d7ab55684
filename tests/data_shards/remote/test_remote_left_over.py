"""After many reads from a server that fails no thread and no socket is left over."""

from __future__ import annotations

import gc
import operator
import os
import random
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.fake_shards import write_fake_shards
from helpers.late_servers import Opened
from helpers.remote_sets import QUICK, open_remote, same

from data_shards.reader import ShardSet
from data_shards.remote.connections import MAX_IDLE
from data_shards.remote.race import Race
from dualforce.data.ahead import ReadAhead
from tools.bench.fault_server import ShardServer, random_faults, serving

OPTIONS = replace(QUICK, second=0.2, stall=2.0, least_stall=0.1, first_wait=0.001, attempts=30)


def held() -> tuple[int, int]:
    """Threads and open files of this process."""
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(sys.platform != "linux", reason="open files are counted in /proc")
@pytest.mark.parametrize("reads", [150, pytest.param(4000, marks=pytest.mark.slow)])
def test_nothing_is_left_over(tmp_path: Path, reads: int) -> None:
    root = write_fake_shards(tmp_path / "set", clips=30, shard_bytes=60_000)
    gc.collect()
    before = held()
    with serving(root, random_faults(0.3, reads), stall=3600.0) as server, pytest.MonkeyPatch.context() as patch:
        assert _read(server, tmp_path / "cache", reads, patch) >= 3, "second requests that won"
        assert sum(server.hits.values()) > 0.2 * reads
    ends = time.monotonic() + 20
    while any(map(operator.gt, held(), before)) and time.monotonic() < ends:
        gc.collect()
        time.sleep(0.01)
    assert not any(map(operator.gt, held(), before)), (held(), before)


def _read(server: ShardServer, cache: Path, reads: int, patch: pytest.MonkeyPatch) -> int:
    """Read clips in eight threads; how often a second request won."""
    won, raced, opened = list[bool](), Race._raced, Opened(patch)
    patch.setattr(Race, "_raced", lambda race, *rest: won.append((x := raced(race, *rest)) is not None) or x)
    local, dice = ShardSet.open(server.root).split("train"), random.Random(reads)
    order = [dice.randrange(len(local)) for _ in range(reads)]
    reader = open_remote(server, cache, OPTIONS, most=1).split("train")
    ahead = ReadAhead(reader.read, 8)
    ahead.expect(order)
    for index in order:
        assert same(ahead.take(index), local.read(index))
    assert not opened.left_over()
    assert len(reader.source.source._transport._connections._pool._free) <= MAX_IDLE  # type: ignore[union-attr]
    return won.count(True)
