"""The cache: bounded, shared, never believed, and whole after a kill."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
import warnings
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_shards import write_fake_shards
from helpers.remote_sets import open_remote, same

from data_shards.reader import ShardSet
from data_shards.remote.cache import DiskCache
from data_shards.remote.fetch import RemoteError
from data_shards.remote.source import locate
from data_shards.schema import ShardError
from tools.bench.fault_server import serving

FORK = multiprocessing.get_context("fork")  # the modules are imported already


def used(root: Path) -> int:
    return sum(path.stat().st_size for path in root.glob("??/*"))


def content(number: int) -> bytes:
    return bytes([number % 251]) * (500 + number % 700)


def test_an_entry_comes_back_as_it_was_put(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_000)
    assert cache.get("a") is None
    cache.put("a", b"one")
    assert cache.get("a") == cache.get("a", 3) == b"one"
    assert DiskCache(tmp_path, 10_000).get("a") == b"one"
    cache.drop("a")
    assert cache.get("a") is None


def test_the_bound_holds_and_what_was_used_last_stays(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 20_000)
    for number in range(80):
        cache.put(f"k{number}", content(number))
        assert used(tmp_path) <= 20_000
        assert cache.get("k0") == content(0), "used again and again"
        _age(tmp_path)
    assert used(tmp_path) > 15_000
    assert cache.get("k79") and cache.get("k78") and not cache.get("k1")


def _age(root: Path) -> None:
    """Clocks of file systems are coarse; the test is not."""
    for path in root.glob("??/*"):
        found = path.stat()
        os.utime(path, (found.st_atime, found.st_mtime - 1))


def test_a_smaller_bound_removes_and_one_entry_larger_than_it_is_not_kept(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 20_000)
    for number in range(20):
        cache.put(f"k{number}", content(number))
    smaller = DiskCache(tmp_path, 3_000)
    assert 0 < used(tmp_path) <= 3_000
    smaller.put("large", bytes(3_001))
    assert smaller.get("large") is None and used(tmp_path) > 0


@pytest.mark.parametrize("text", ["", "x", "-5", "9" * 30])
def test_a_sum_that_cannot_be_read_is_counted_anew(tmp_path: Path, text: str) -> None:
    cache = DiskCache(tmp_path, 5_000)
    for number in range(30):
        (tmp_path / "bytes").write_text(text)
        cache.put(f"k{number}", content(number))
        assert used(tmp_path) <= 5_000


def test_an_entry_of_another_size_is_removed(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 5_000)
    cache.put("a", b"whole")
    (path,) = tmp_path.glob("??/*")
    path.write_bytes(b"who")
    assert cache.get("a", 5) is None and not path.exists()


def test_what_is_no_plain_file_is_not_read(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 5_000)
    cache.put("a", b"whole")
    (path,) = tmp_path.glob("??/*")
    path.unlink()
    os.mkfifo(path)
    assert cache.get("a") is None
    secret = tmp_path / "secret"
    secret.write_bytes(b"whole")
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    with pytest.warns(RuntimeWarning, match=r"data\.cache: .*: read from the server again"):
        assert cache.get("a") is None


def test_a_folder_that_cannot_be_written_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RemoteError, match=r"data\.cache: .*/file: .*: expected a folder that can be written"):
        DiskCache(tmp_path / "file", 5_000)


def test_a_full_disk_is_warned_of_and_the_clips_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = DiskCache(tmp_path, 5_000)

    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        cache.put("a", b"whole")
    monkeypatch.undo()
    assert cache.get("a") is None


def _work(root: Path, seed: int, most: int) -> None:
    generator, cache = random.Random(seed), DiskCache(root, most)
    for _ in range(150):
        number = generator.randrange(60)
        found = cache.get(f"k{number}", len(content(number)))
        if found is None:
            cache.put(f"k{number}", content(number))
        elif found != content(number):
            raise SystemExit(3)


def test_processes_share_it_and_the_bound_holds(tmp_path: Path) -> None:
    workers = [FORK.Process(target=_work, args=(tmp_path, seed, 20_000)) for seed in range(2)]
    for worker in workers:
        worker.start()
    most = 0
    while any(worker.is_alive() for worker in workers):
        sizes = []
        for path in tmp_path.glob("??/*"):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:
                sizes = []
                break
        most = max(most, sum(sizes))
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert 0 < used(tmp_path) <= 20_000
    # Looking takes time, in which entries come and go; but not as many as would make it half as much again.
    assert most <= 30_000


def _killed(work: Callable[..., None], *arguments: Any, after: float) -> None:
    """Run `work` in a process of its own and kill it, `after` seconds after it is ready."""
    ready = FORK.Event()
    child = FORK.Process(target=work, args=(*arguments, ready))
    child.start()
    assert ready.wait(30)
    time.sleep(after)
    child.kill()
    child.join()


def _write_for_ever(root: Path, ready: Event) -> None:
    cache, number = DiskCache(root, 3_000_000), 0
    ready.set()
    while True:
        cache.put(f"k{number}", bytes([number % 251]) * 400_000)
        number += 1


def test_a_kill_while_it_is_written_leaves_nothing_wrong(tmp_path: Path) -> None:
    generator = random.Random(5)
    for _ in range(20):
        _killed(_write_for_ever, tmp_path, after=generator.uniform(0.0, 0.05))
        files = list(tmp_path.glob("??/*"))
        assert files and all(path.stat().st_size == 400_000 for path in files)
        assert all(len(set(path.read_bytes())) == 1 for path in files)
        began = time.monotonic()
        cache = DiskCache(tmp_path, 3_000_000)
        cache.put("after", b"all is well")
        assert time.monotonic() - began < 5, "the lock of a dead process is free"
        assert cache.get("after") == b"all is well" and used(tmp_path) <= 3_000_000
        cache.drop("after")


def _read_all(url: str, cache: Path, ready: Event) -> None:
    reader = ShardSet.open(locate(url, cache)).split("train")
    ready.set()
    for i in range(len(reader)):
        reader.read(i)


def test_a_kill_while_clips_are_read_leaves_a_cache_that_gives_the_right_ones(tmp_path: Path) -> None:
    root = write_fake_shards(tmp_path / "set", clips=24, height=16, width=16)
    local = ShardSet.open(root).split("train")
    with serving(root) as server:
        for delay in (0.01, 0.03, 0.05):
            _killed(_read_all, server.url, tmp_path / "cache", after=delay)
        ours = open_remote(server, tmp_path / "cache").split("train")
        assert all(same(ours.read(i), local.read(i)) for i in range(len(local)))


def test_damage_in_the_cache_costs_a_request_and_nothing_else(tmp_path: Path) -> None:
    root = write_fake_shards(tmp_path / "set", clips=6)
    local = ShardSet.open(root).split("train")
    with serving(root) as server:
        opened = open_remote(server, tmp_path / "cache")
        for i in range(6):
            opened.split("train").read(i)
        for path in (tmp_path / "cache").glob("??/*"):  # the index too
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 4
            path.write_bytes(bytes(data))
        asked = len(server.requests)
        again = open_remote(server, tmp_path / "cache").split("train")
        assert all(same(again.read(i), local.read(i)) for i in range(6))
        assert len(server.requests) - asked == 2 + len(list(root.glob("*.sums.safetensors"))) + 6
        asked = len(server.requests)
        assert all(same(again.read(i), local.read(i)) for i in range(6))
        assert len(server.requests) == asked


def test_wrong_bytes_of_the_server_are_not_kept(tmp_path: Path) -> None:
    root = write_fake_shards(tmp_path / "set", clips=2)
    with serving(root) as server:
        reader = open_remote(server, tmp_path / "cache").split("train")
        kept = used(tmp_path / "cache")
        server.fault = lambda name, number: "changed" if name.endswith(".tar") else None
        with pytest.raises(ShardError, match="damaged data"):
            reader.read(0)
        assert used(tmp_path / "cache") == kept


def test_ranks_of_one_machine_fetch_a_clip_once(tmp_path: Path) -> None:
    root = write_fake_shards(tmp_path / "set", clips=12, height=16, width=16)
    with serving(root) as server:
        arguments = (server.url, tmp_path / "cache", FORK.Event())
        ranks = [FORK.Process(target=_read_all, args=arguments) for _ in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(60)
        assert [rank.exitcode for rank in ranks] == [0, 0]
        tars = [request for request in server.requests if request[0].endswith(".tar")]
        assert len(tars) == len(set(tars)) == 12
        assert sum("safetensors" in request[0] for request in server.requests) == 1 + len(
            list(root.glob("*.sums.safetensors"))
        )


def test_a_process_that_stands_still_with_a_lock_does_not_hold_up_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_shards.remote.cache.LOCK_SECONDS", 0.3)
    root = write_fake_shards(tmp_path / "set", clips=3)
    with serving(root) as server:
        reader = open_remote(server, tmp_path / "cache").split("train")
        holder = DiskCache(tmp_path / "cache", 2**28)
        began = time.monotonic()
        with holder._locked(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            reader.read(0)
        assert 0.2 < time.monotonic() - began < 3
        assert any("read from the server again" in str(warning.message) for warning in told)
