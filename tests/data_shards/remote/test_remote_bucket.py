"""Object stores through fsspec, for which its file system in memory stands here."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from helpers.fake_shards import write_fake_shards
from helpers.remote_sets import QUICK, same

from data_shards.reader import ShardSet
from data_shards.remote.address import SCHEMES
from data_shards.remote.fetch import FetchOptions, RemoteError
from data_shards.remote.source import locate

CLIPS = 10


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_shards(tmp_path_factory.mktemp("set") / "set", clips=CLIPS, shard_bytes=60_000)


@pytest.fixture
def store(root: Path, tmp_path: Path) -> Iterator[Any]:
    """The set in a bucket that is empty again afterwards."""
    store = fsspec.filesystem("memory")
    store.put(str(root) + "/", "/bucket/a/set/", recursive=True)
    yield store
    store.rm("/bucket", recursive=True)


def open_store(cache: Path, options: FetchOptions = QUICK, most: int = 2**28) -> ShardSet:
    return ShardSet.open(locate("memory://bucket/a/set", cache, most, options, (*SCHEMES, "memory")))


def test_clips_of_a_bucket_are_those_of_the_folder(store: Any, root: Path, tmp_path: Path) -> None:
    local, opened = ShardSet.open(root), open_store(tmp_path)
    for split in ("train", "validation"):
        ours, theirs = opened.split(split), local.split(split)
        for i in range(len(theirs)):
            assert same(ours.read(i), theirs.read(i)) and same(ours.read(i, 3, 1), theirs.read(i, 3, 1))
    opened.verify()
    asked: list[str] = []
    read = MemoryFileSystem.cat_file
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryFileSystem, "cat_file", lambda self, path, **k: asked.append(path) or read(self, path, **k))
        again = open_store(tmp_path)
        again.split("train").read(0)
    assert [path.rpartition("/")[2] for path in asked] == ["manifest.json"], "the rest is in the cache"


def test_faults_of_a_bucket(store: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, count = MemoryFileSystem.cat_file, [0]

    def faulty(self: Any, path: str, **options: Any) -> bytes:
        count[0] += 1
        data: bytes = read(self, path, **options)
        match count[0] % 12:
            case 1:
                raise OSError("slow down")
            case 4:
                raise TimeoutError
            case 6:
                return data[: len(data) // 2]
            case 8:
                return bytes(byte ^ 0x10 if at % 97 == 5 else byte for at, byte in enumerate(data))
            case 10 if count[0] < 60:
                time.sleep(0.7)
            case 11:
                raise RuntimeError("of a library, with me:hunter2@host/x?sig=s3cret")
        return data

    monkeypatch.setattr(MemoryFileSystem, "cat_file", faulty)
    options = FetchOptions(attempts=8, first_wait=0.002, longest_wait=0.01, stall=0.2, content_attempts=8)
    ours, theirs = open_store(tmp_path, options, most=1).split("train"), ShardSet.open(root).split("train")
    for i in [*range(CLIPS)] * 2:
        assert same(ours.read(i), theirs.read(i))
    assert count[0] > 40


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (FileNotFoundError("gone"), "FileNotFoundError gone: expected a file that may be read"),
        (PermissionError("denied"), "PermissionError denied: expected a file that may be read"),
    ],
)
def test_a_lasting_fault_is_told_of_at_once(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: OSError, told: str
) -> None:
    reader = open_store(tmp_path, FetchOptions()).split("train")

    def fail(self: Any, path: str, **options: Any) -> bytes:
        raise fault

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fail)
    began = time.monotonic()
    with pytest.raises(RemoteError, match=rf"memory://bucket/a/set/train-000000\.tar: sample 'train-0001': .*{told}"):
        reader.read(1)
    assert time.monotonic() - began < 1


def test_a_store_that_stands_still_is_given_up(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = FetchOptions(attempts=2, first_wait=0.01, stall=0.1, least_rate=1e9)
    reader = open_store(tmp_path, options).split("train")
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda self, path, **options: time.sleep(3))
    began = time.monotonic()
    with pytest.raises(RemoteError, match=r"no answer in time.*given up after"):
        reader.read(1)
    assert time.monotonic() - began < 2


def test_a_tar_that_changes_is_told_from_damage(store: Any, tmp_path: Path) -> None:
    reader = open_store(tmp_path).split("train")
    reader.read(0)
    path = "/bucket/a/set/train-000000.tar"
    data = store.cat_file(path)
    store.pipe_file(path, bytes(byte ^ 3 for byte in data))
    with pytest.raises(RemoteError, match=r"sample 'train-0001'.*damaged data.*the tar changed on the server"):
        reader.read(1)
    store.pipe_file(path, data[:1024])
    with pytest.raises(RemoteError, match=f"a file of 1024 bytes: expected {len(data)}, the manifest's"):
        reader.read(1)


@pytest.mark.skipif(importlib.util.find_spec("s3fs") is not None, reason="s3fs is installed")
def test_a_package_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match=r"s3://bucket/set: Install s3fs to access S3: expected the package of s3://"):
        locate("s3://bucket/set", tmp_path)
