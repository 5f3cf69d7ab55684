"""How long is waited for a server: as long as it has needed lately, and longer each time."""

from __future__ import annotations

import math
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.fake_shards import write_fake_shards
from helpers.remote_sets import open_remote, same

from data_shards.reader import ShardSet
from data_shards.remote.address import Address, parse_address
from data_shards.remote.fetch import AWAY, Failures, Fetcher, FetchOptions, RemoteError, Stalled, Wanted
from data_shards.remote.timed import Patience
from data_shards.remote.web import Web
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


def test_what_is_unusual_follows_from_what_was_usual() -> None:
    patience = Patience(10.0, 0.25)
    for wait in (0.1, 0.2, 0.4):
        assert patience.unusual() == math.inf
        patience.note(wait)
    patience.note(0.1)
    assert patience.unusual() == pytest.approx(0.6)
    for _ in range(60):
        patience.note(0.1)
    assert patience.unusual() == pytest.approx(0.15)
    for _ in range(64):
        patience.note(0.001)
    assert patience.unusual() == pytest.approx(0.05) and patience.seconds(0) == 0.25


def test_a_connection_is_waited_for_no_longer_than_for_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def never(place: object, timeout: float, *rest: object) -> None:
        limits.append(timeout)
        raise TimeoutError

    monkeypatch.setattr("socket.create_connection", never)
    place = parse_address("http://host/set")
    assert isinstance(place, Address)
    web = Web(place, FetchOptions(stall=7.0))
    for seconds in (100.0, 3.0, -1.0):
        with pytest.raises(Stalled), web.get("manifest.json", 0, None, seconds):
            pass
    assert limits[0] == 7.0 and 0 < limits[1] <= 3.0 and 0 < limits[2] < 0.01


def test_waits_between_requests_grow_and_are_partly_random() -> None:
    options = FetchOptions(first_wait=1.0, longest_wait=20.0)
    for failures, longest in ((-1, 0), (0, 0), (1, 1), (2, 3), (3, 9), (4, 20), (5, 20), (10**6, 20)):
        pauses = [options.pause(failures) for _ in range(200)]
        assert 0.5 * longest <= min(pauses) <= 0.6 * longest and 0.9 * longest <= max(pauses) <= longest


def test_which_failures_count() -> None:
    """b: broken off, o: another, p: another after much has come. 0 is no pause at all."""

    def counts(kinds: str) -> list[int]:
        failures = Failures()
        return [failures.add(kind == "b", kind == "p") for kind in kinds]

    assert counts("bbbb") == [0, 1, 2, 3] and counts("oooo") == [1, 2, 3, 4]
    assert counts("bobobo") == [0, 1, 1, 2, 2, 3], "each sort for itself"
    assert counts("bobobobobo")[AWAY - 1 :] == [8, 9, 10], "a server that is away"
    assert counts("bbbbbbbbb")[AWAY - 2 :] == [6, 8, 9]
    assert counts("ooopob") == [1, 2, 3, 1, 1, 0]


@pytest.mark.parametrize("kind", ["reset", "short", "cut_length", "whole", "changed", "changed_mark"])
def test_the_first_answer_that_broke_off_is_asked_for_again_at_once(tmp_path: Path, kind: str) -> None:
    kept = ["reset"] * (kind == "reset")  # of a connection that was kept, which is asked for again by itself
    assert _pauses(tmp_path, [*kept, kind]) == [0.0]
    first, second = _pauses(tmp_path, [*kept, kind, kind])
    assert first == 0.0 and 0.5 <= second <= 1.0


@pytest.mark.parametrize("kind", ["500", "503", "429", "silent", "stall"])
def test_a_server_that_may_be_busy_has_a_pause_at_once(tmp_path: Path, kind: str) -> None:
    first, second = _pauses(tmp_path, [kind, kind])
    assert 0.5 <= first <= 1.0 and 1.5 <= second <= 3.0


def test_a_server_that_takes_no_connections_has_a_pause_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("data_shards.remote.fetch.time", _clock(slept))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        place = parse_address(f"http://127.0.0.1:{taken.getsockname()[1]}/set")
        assert isinstance(place, Address)
        options = FetchOptions(attempts=3, first_wait=1.0)
        with pytest.raises(RemoteError, match=r"Connection refused: expected an answer \(given up .*, 3 failures"):
            Fetcher(Web(place, options), options).read(Wanted("manifest.json", 0, None, 100))
    assert len(slept) == 2 and 0.5 <= slept[0] <= 1.0 and 1.5 <= slept[1] <= 3.0


def _clock(slept: list[float]) -> SimpleNamespace:
    return SimpleNamespace(monotonic=time.monotonic, sleep=slept.append)


def _pauses(folder: Path, kinds: list[str]) -> list[float]:
    """The seconds slept when a clip is read through these faults."""
    root = folder / "set"
    if not root.is_dir():
        write_fake_shards(root, clips=4, frames=5)
    options = FetchOptions(first_wait=1.0, stall=20.0, second=0.0)
    slept: list[float] = []
    with serving(root) as server, pytest.MonkeyPatch.context() as patch:
        reader = open_remote(server, folder / "cache", options, most=1).split("train")
        reader.read(0)  # the checksums too
        asked = len(server.requests)
        server.fault = lambda name, number: dict(enumerate(kinds, asked + 1)).get(number)

        def seconds(patience: Patience, stalls: int) -> float:
            silent = kinds[0] in ("silent", "stall") and len(server.requests) < asked + len(kinds)
            return 0.5 if silent else 20.0  # a busy machine is no stall

        patch.setattr(Patience, "seconds", seconds)
        for module in ("fetch", "folder"):
            patch.setattr(f"data_shards.remote.{module}.time", _clock(slept))
        assert same(reader.read(1), ShardSet.open(root).split("train").read(1))
        assert list(server.hits.values()) == [len(kinds)]
    return slept


@pytest.mark.parametrize("kind", ["stall", "silent"])
def test_one_stalled_request_costs_no_ten_seconds(tmp_path: Path, kind: str) -> None:
    root = write_fake_shards(tmp_path / "set", clips=12, frames=5, shard_bytes=30_000)
    local = ShardSet.open(root).split("train")
    with serving(root) as server:
        reader = open_remote(server, tmp_path / "cache", FetchOptions(least_stall=0.25, second=0.0)).split("train")
        for index in range(8):
            reader.read(index)
        asked = len(server.requests)
        server.fault = lambda name, number: kind if number == asked + 1 else None
        began = time.monotonic()
        assert same(reader.read(9), local.read(9))
        assert len(server.requests) == asked + 2
        assert 0.09 < time.monotonic() - began < 6


def test_only_stalls_lengthen_the_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, counts = write_fake_shards(tmp_path / "set", clips=12, frames=5, shard_bytes=30_000), list[int]()
    with serving(root) as server:
        reader = open_remote(server, tmp_path / "cache", FetchOptions(first_wait=0.001, second=0.0)).split("train")
        for index in range(8):
            reader.read(index)
        asked = len(server.requests)
        kinds = {1: "500", 2: "short", 3: "503", 4: "silent", 5: "stall"}
        server.fault = lambda name, number: kinds.get(number - asked)
        seconds = Patience.seconds
        monkeypatch.setattr(Patience, "seconds", lambda self, stalls: counts.append(stalls) or seconds(self, stalls))
        reader.read(9)
        assert len(server.requests) == asked + 6 and counts == [0, 0, 0, 0, 1, 2]


def test_a_server_that_has_become_slow_is_waited_for(tmp_path: Path) -> None:
    """Every request now takes longer than any before: the first tries are given up, later ones are not."""
    root = write_fake_shards(tmp_path / "set", clips=14, frames=5, shard_bytes=30_000)
    local = ShardSet.open(root).split("train")
    with serving(root) as server:
        reader = open_remote(server, tmp_path / "cache", FetchOptions(first_wait=0.01, second=0.0)).split("train")
        for index in range(8):
            reader.read(index)
        server.latency = 0.8
        counts = []
        for index in range(8, 13):
            asked = len(server.requests)
            assert same(reader.read(index), local.read(index))
            counts.append(len(server.requests) - asked)
    assert counts[0] >= 2 and counts[3:] == [1, 1]
