"""Index and checksums of a set on a server: asked for once, bounded in memory, and never a reason for a wait."""

from __future__ import annotations

import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
from helpers.fake_shards import write_fake_shards
from helpers.remote_sets import open_remote, same

from data_shards.reader import ShardReader, ShardSet
from data_shards.remote.folder import RemoteFolder
from data_shards.remote.source import RemoteSet
from data_shards.schema import ShardError
from tools.bench.fault_server import serving

SUMS = "sums.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_shards(tmp_path_factory.mktemp("set") / "set", clips=12, shard_bytes=30_000)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob(f"*.{SUMS}"))


def set_of(opened: ShardSet) -> RemoteSet:
    assert isinstance(opened.source, RemoteFolder)
    return opened.source.source


def all_same(reader: ShardReader, root: Path) -> bool:
    local = ShardSet.open(root).split("train")
    return len(reader) == len(local) and all(same(reader.read(i), local.read(i)) for i in range(len(local)))


def test_opening_asks_for_manifest_index_and_checksums_once_and_for_no_tar(root: Path, tmp_path: Path) -> None:
    assert len(names(root)) > 3
    with serving(root) as server:
        opened = open_remote(server, tmp_path)
        assert sorted(request[0] for request in server.requests) == sorted(
            ["manifest.json", "index.safetensors", *names(root)]
        )
        assert all_same(opened.split("train"), root)
        assert len(server.requests) == 2 + len(names(root)) + 12


def test_one_lock_for_everything_holds_nobody_up(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two keys may share a lock; a cache that keeps nothing has checksums fetched while clips are read."""
    monkeypatch.setattr("data_shards.remote.cache.STRIPES", 1)
    monkeypatch.setattr("data_shards.remote.source.HELD", 0)
    with serving(root) as server:
        began = time.monotonic()
        assert all_same(open_remote(server, tmp_path / "none", most=1).split("train"), root)
        assert all_same(open_remote(server, tmp_path / "all").split("train"), root)
        assert time.monotonic() - began < 10


def test_checksums_in_memory_are_bounded(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    most = 3 * max((root / name).stat().st_size for name in names(root))
    monkeypatch.setattr("data_shards.remote.source.HELD", most)
    with serving(root) as server:
        opened = open_remote(server, tmp_path)
        reader, held = opened.split("train"), set_of(opened)._sums
        for i in range(len(reader)):
            reader.read(i)
            assert 0 < sum(map(len, held.values())) <= most
        assert len(held) > 1, "those of the tars read last stay"
        assert all_same(reader, root)


def test_checksums_that_are_too_many_are_read_clip_by_clip(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_shards.remote.source.MAX_SUMS", 10)
    with serving(root) as server:
        opened = open_remote(server, tmp_path)
        assert not any(request[0].endswith(SUMS) for request in server.requests)
        reader = opened.split("train")
        assert all_same(reader, root)
        asked = [request for request in server.requests if request[0].endswith(SUMS)]
        assert len(asked) == 12 and all(request[1] for request in asked)
        assert all_same(reader, root)
        assert server.named(names(root)[0]) == sum(request[0] == names(root)[0] for request in asked), "kept"
        for path in tmp_path.glob("??/*"):  # also these are checked
            path.write_bytes(bytes(path.stat().st_size))
        assert all_same(reader, root)


def test_checksums_do_not_go_from_process_to_process(root: Path, tmp_path: Path) -> None:
    with serving(root) as server:
        opened = open_remote(server, tmp_path)
        before = len(ForkingPickler.dumps(opened.source))
        opened.split("train").read(0)
        assert set_of(opened)._sums and len(ForkingPickler.dumps(opened.source)) < before + 300
        handed = ForkingPickler.loads(ForkingPickler.dumps(opened.source))
        assert all_same(ShardSet.open(handed).split("train"), root)


def test_an_index_that_is_too_large_is_not_asked_for(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (root / "index.safetensors").stat().st_size
    for module in ("data_shards.reader", "data_shards.remote.source"):
        monkeypatch.setattr(f"{module}.MAX_INDEX_BYTES", size - 1)
    with serving(root) as server:
        with pytest.raises(ShardError, match=rf"/set/index\.safetensors: {size} bytes: expected at most {size - 1}"):
            open_remote(server, tmp_path)
        assert server.named("index.safetensors") == 0


def test_ranges_beyond_the_end_over_each_other_and_empty_ones(root: Path, tmp_path: Path) -> None:
    name = "train-000000.tar"
    data = (root / name).read_bytes()
    end = len(data)
    cases = [
        ([(end - 10, 30), (end + 5, 3), (0, 100), (90, 40), (50, 0)], [10, 0, 100, 40, 0]),
        ([(0, 100), (20, 10)], [100, 10]),
        ([(0, 0)], [0]),
    ]
    with serving(root) as server:
        for source in (open_remote(server, tmp_path).source, ShardSet.open(root).source):
            for asked, wanted in cases:
                rooms = [bytearray(size) for _, size in asked]
                counts = source.fill(name, [(at, memoryview(room)) for (at, _), room in zip(asked, rooms, strict=True)])
                assert counts == wanted
                for (at, _), room, count in zip(asked, rooms, counts, strict=True):
                    assert room[:count] == data[at : at + count] and not any(room[count:])
