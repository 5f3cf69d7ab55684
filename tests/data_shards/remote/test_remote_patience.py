"""How long is waited for a server: as long as it has needed lately, and longer each time."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from helpers.fake_shards import write_fake_shards
from helpers.remote_sets import open_remote, same

from data_shards.reader import ShardSet
from data_shards.remote.fetch import FetchOptions
from data_shards.remote.timed import Patience
from tools.bench.fault_server import serving


def test_nothing_is_known_of_a_server_at_first() -> None:
    patience = Patience(10.0, 0.1)
    for _ in range(7):
        assert [patience.seconds(stalls) for stalls in range(3)] == [2.0, 4.0, 8.0]
        patience.note(0.001)
    patience.note(0.001)
    assert patience.seconds(0) == 0.1


@pytest.mark.parametrize(
    ("usual", "waits"), [(0.001, [0.1, 0.2, 0.4, 0.8, 1.6]), (0.2, [0.8, 1.6, 3.2, 6.4, 10]), (3.0, [10, 10])]
)
def test_patience_follows_the_usual_wait_and_grows_with_stalls(usual: float, waits: list[float]) -> None:
    patience = Patience(10.0, 0.1)
    for i in range(20):
        patience.note(usual if i < 18 else 9.0)
    assert patience.seconds(0) == 10.0  # more than a tenth
    for _ in range(10):
        patience.note(usual)
    assert [patience.seconds(stalls) for stalls in range(len(waits))] == pytest.approx(waits)
    assert patience.seconds(10**6) == 10.0


def test_what_was_slow_long_ago_is_forgotten() -> None:
    patience = Patience(10.0, 0.1)
    for wait in [3.0, *[0.01] * 64]:
        patience.note(wait)
    assert patience.seconds(0) == 0.1


def test_no_wait_is_longer_than_the_limit() -> None:
    patience = Patience(0.05, 0.1)
    for _ in range(9):
        patience.note(0.0)
    assert patience.seconds(0) == 0.05


def test_waits_between_requests_grow_and_are_partly_random() -> None:
    options = FetchOptions(first_wait=1.0, longest_wait=20.0)
    for failures, longest in ((0, 1), (1, 1), (2, 3), (3, 9), (4, 20), (5, 20), (10**6, 20)):
        pauses = [options.pause(failures) for _ in range(200)]
        assert 0.5 * longest <= min(pauses) < 0.6 * longest and 0.9 * longest < max(pauses) <= longest


@pytest.mark.parametrize("kind", ["stall", "silent"])
def test_one_stalled_request_costs_no_ten_seconds(tmp_path: Path, kind: str) -> None:
    root = write_fake_shards(tmp_path / "set", clips=12, frames=5, shard_bytes=30_000)
    local = ShardSet.open(root).split("train")
    with serving(root) as server:
        reader = open_remote(server, tmp_path / "cache", FetchOptions(least_stall=0.25)).split("train")
        for index in range(8):
            reader.read(index)
        asked = len(server.requests)
        server.fault = lambda name, number: kind if number == asked + 1 else None
        began = time.monotonic()
        assert same(reader.read(9), local.read(9))
        assert len(server.requests) == asked + 2
        assert 0.09 < time.monotonic() - began < 6


def test_other_faults_before_a_stall_do_not_lengthen_it(tmp_path: Path) -> None:
    root = write_fake_shards(tmp_path / "set", clips=12, frames=5, shard_bytes=30_000)
    with serving(root) as server:
        reader = open_remote(server, tmp_path / "cache", FetchOptions(first_wait=0.001)).split("train")
        for index in range(8):
            reader.read(index)
        asked = len(server.requests)
        server.fault = lambda name, number: {1: "500", 2: "short", 3: "503", 4: "silent"}.get(number - asked)
        began = time.monotonic()
        reader.read(9)
        assert len(server.requests) == asked + 5
        # Four stalls' worth of patience would be 10 s.
        assert 0.09 < time.monotonic() - began < 6


def test_a_server_that_has_become_slow_is_waited_for(tmp_path: Path) -> None:
    """Every request now takes longer than any before: the first tries are given up, later ones are not."""
    root = write_fake_shards(tmp_path / "set", clips=14, frames=5, shard_bytes=30_000)
    local = ShardSet.open(root).split("train")
    with serving(root) as server:
        reader = open_remote(server, tmp_path / "cache", FetchOptions(first_wait=0.01)).split("train")
        for index in range(8):
            reader.read(index)
        server.latency = 0.8
        counts = []
        for index in range(8, 13):
            asked = len(server.requests)
            assert same(reader.read(index), local.read(index))
            counts.append(len(server.requests) - asked)
    assert counts[0] >= 2 and counts[3:] == [1, 1]
