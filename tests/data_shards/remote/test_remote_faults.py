"""A server that fails in every way: never a wrong sample, never a hang, and one line when it is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.fake_shards import write_fake_shards
from helpers.remote_sets import QUICK, open_remote, same

from data_shards.reader import ShardSet
from data_shards.remote.address import Address, parse_address
from data_shards.remote.fetch import Fetcher, FetchOptions, RemoteError, Wanted
from data_shards.remote.web import Web
from data_shards.schema import ShardError
from tools.bench.fault_server import PASSING, ShardServer, random_faults, serving

FRAMES = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set") / "set"
    return write_fake_shards(folder, clips=30, frames=9, flame=True, text_dim=6, shard_bytes=60_000)


@pytest.fixture(scope="module")
def local(root: Path) -> ShardSet:
    return ShardSet.open(root)


def test_a_healthy_server_gives_the_clips_with_one_request_each(root: Path, local: ShardSet, tmp_path: Path) -> None:
    with serving(root) as server:
        opened = open_remote(server, tmp_path)
        assert opened.manifest == local.manifest
        asked = len(server.requests)
        for split in ("train", "validation"):
            ours, theirs = opened.split(split), local.split(split)
            assert ours.keys == theirs.keys
            for i in range(len(theirs)):
                assert same(ours.read(i), theirs.read(i))
                assert same(ours.read(i, 4, 2), theirs.read(i, 4, 2))
        clips = len(local.split("train")) + len(local.split("validation"))
        assert len(server.requests) - asked == 2 * clips
        opened.verify()


def test_only_the_bytes_of_a_prefix_are_asked_for(
    root: Path, local: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_shards.remote.folder.JOINED", 0)
    with serving(root) as server:
        reader = open_remote(server, tmp_path).split("train")
        asked = len(server.requests)
        assert same(reader.read(1, 4, 2), local.split("train").read(1, 4, 2))
        ranges = [_range_of(request[1]) for request in server.requests[asked:]]
    clip = local.split("train").read(1, 4, 2)
    wanted = sum(tensor.numel() * tensor.element_size() for tensor in clip.tensors().values())
    assert len(ranges) > 3 and wanted <= sum(stop - start for start, stop in ranges) < wanted + 600


def test_a_kept_clip_is_read_without_the_server(root: Path, local: ShardSet, tmp_path: Path) -> None:
    with serving(root) as server:
        open_remote(server, tmp_path).split("train").read(3)
        again = open_remote(server, tmp_path)
        asked = len(server.requests)
        server.fault = lambda name, number: "500"
        assert same(again.split("train").read(3), local.split("train").read(3))
        assert len(server.requests) == asked
        assert sum("sums" in request[0] for request in server.requests) == len(list(root.glob("*.sums.safetensors")))


@pytest.mark.parametrize("seed", range(3))
def test_thirty_percent_of_faults_give_no_wrong_sample(root: Path, local: ShardSet, tmp_path: Path, seed: int) -> None:
    reads = _read_through_faults(root, local, tmp_path, seed, rounds=2)
    assert reads >= 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 105))
def test_thirty_percent_of_faults_for_long(root: Path, local: ShardSet, tmp_path: Path, seed: int) -> None:
    assert _read_through_faults(root, local, tmp_path, seed, rounds=20) >= 1000


def _read_through_faults(root: Path, local: ShardSet, cache: Path, seed: int, rounds: int) -> int:
    reads = 0
    with serving(root, random_faults(0.3, seed)) as server:
        opened = open_remote(server, cache, replace(QUICK, second=0.1), most=1)  # nothing is kept
        ours, theirs = opened.split("train"), local.split("train")
        for _ in range(rounds):
            for i in range(len(theirs)):
                assert same(ours.read(i), theirs.read(i))
                assert same(ours.read(i, FRAMES, 1), theirs.read(i, FRAMES, 1))
                reads += 2
        assert set(server.hits) == set(PASSING), "every fault has come"
        assert sum(server.hits.values()) >= 0.2 * len(server.requests)
    return reads


ENDLESS_FAULTS = {
    "500": "status 500", "503": "status 503", "429": "status 429", "reset": "RemoteDisconnected",
    "silent": "stalled", "stall": "stalled", "short": "short body", "cut_length": "expected those from",
    "whole": "status 200", "drip": "too slow", "giant": "expected those from", "endless": "more bytes",
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(ENDLESS_FAULTS))
def test_a_fault_that_does_not_end_is_one_line_in_bounded_time(root: Path, tmp_path: Path, kind: str) -> None:
    options = FetchOptions(attempts=3, first_wait=0.01, stall=0.3, least_rate=1e6, patience=20.0)
    with serving(root) as server:
        reader = open_remote(server, tmp_path, options).split("train")
        server.fault = lambda name, number: kind
        began = time.monotonic()
        with pytest.raises(RemoteError) as caught:
            reader.read(5)
        assert time.monotonic() - began < 6
    message = str(caught.value)
    assert message.startswith(f"{server.url}/train-00000"), message
    assert "sample 'train-0005': train-0005.json and train-0005.safetensors: bytes " in message
    assert ENDLESS_FAULTS[kind] in message and "expected" in message and "given up after" in message
    assert "\n" not in message and len(message) < 400


@pytest.mark.parametrize("kind", ["403", "401", "404", "gzip"])
def test_a_lasting_fault_is_told_of_at_once(root: Path, tmp_path: Path, kind: str) -> None:
    with serving(root) as server:
        reader = open_remote(server, tmp_path, FetchOptions(least_stall=10.0, second=0.0)).split("train")
        server.fault = lambda name, number: kind
        asked, began = len(server.requests), time.monotonic()
        with pytest.raises(RemoteError, match=r"sample 'train-0005'.*(status 40\d|Content-Encoding 'gzip'): expected"):
            reader.read(5)
        assert len(server.requests) == asked + 1 and time.monotonic() - began < 1


def test_patience_bounds_all_requests_together(root: Path, tmp_path: Path) -> None:
    options = FetchOptions(attempts=1000, first_wait=0.01, longest_wait=0.05, stall=5.0, patience=1.0)
    with serving(root) as server:
        reader = open_remote(server, tmp_path, options).split("train")
        server.fault = lambda name, number: "silent"
        began = time.monotonic()
        with pytest.raises(RemoteError, match="given up after 1 s"):
            reader.read(0)
        assert time.monotonic() - began < 2


def test_what_has_arrived_is_not_asked_for_again(root: Path, local: ShardSet, tmp_path: Path) -> None:
    with serving(root) as server:
        reader = open_remote(server, tmp_path).split("train")
        asked = len(server.requests)
        server.fault = lambda name, number: "short" if number in (asked + 1, asked + 2) else None
        assert same(reader.read(2), local.split("train").read(2))
        starts = [_range_of(request[1]) for request in server.requests[asked:]]
    (a, end), (b, _), (c, last) = starts
    assert a < b < c and end == last
    assert b == a + (end - a) // 2 and c == b + (end - b) // 2


def test_without_a_mark_of_the_content_reading_begins_again(root: Path, local: ShardSet, tmp_path: Path) -> None:
    with serving(root) as server:
        server.marks = False
        reader = open_remote(server, tmp_path).split("train")
        asked = len(server.requests)
        server.fault = lambda name, number: "short" if number == asked + 1 else None
        assert same(reader.read(2), local.split("train").read(2))
        first, second = (request[1] for request in server.requests[asked:])
    assert first == second


def test_two_states_of_a_file_are_never_joined(root: Path, local: ShardSet, tmp_path: Path) -> None:
    with serving(root) as server:
        reader = open_remote(server, tmp_path).split("train")
        asked = len(server.requests)
        server.fault = lambda name, number: {asked + 1: "short", asked + 2: "changed_mark"}.get(number)
        assert same(reader.read(2), local.split("train").read(2))
        ranges = [_range_of(request[1]) for request in server.requests[asked:]]
    assert ranges[0][0] < ranges[1][0] and ranges[2] == ranges[0]


def test_the_bytes_are_those_of_one_state_without_any_checksum(root: Path) -> None:
    """What `test_two_states...` sees from outside, where a checksum would also have found the mixture."""
    data = (root / "train-000000.tar").read_bytes()
    for second in ("changed_mark", "500", "whole"):
        with serving(root) as server:
            server.fault = lambda name, number, second=second: {1: "short", 2: second}.get(number)  # type: ignore[misc]
            place = parse_address(server.url)
            assert isinstance(place, Address)
            fetcher = Fetcher(Web(place, QUICK), QUICK)
            assert fetcher.read(Wanted("train-000000.tar", 0, len(data), len(data)))[0] == data
            server.fault = lambda name, number: "short" if number == 5 else None
            assert fetcher.read(Wanted("train-000000.tar", 512, 5000, len(data)))[0] == data[512:5000]


def test_retry_after_is_heeded(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    pause = Fetcher._pause

    def recorded(fetcher: Fetcher, failures: int, after: float | None) -> float:
        waits.append(pause(fetcher, failures, after))
        return 0.0

    monkeypatch.setattr(Fetcher, "_pause", recorded)
    monkeypatch.setattr("tools.bench.fault_server._Handler._plain", _busy)
    with serving(root) as server:
        reader = open_remote(server, tmp_path, FetchOptions(longest_wait=5.0)).split("train")
        asked = len(server.requests)
        server.fault = lambda name, number: "503" if number <= asked + 2 else None
        reader.read(0)
    assert waits == [3.0, 3.0]


def _busy(handler: object, status: int) -> None:
    handler.send_response(status)  # type: ignore[attr-defined]
    handler.send_header("Retry-After", "3")  # type: ignore[attr-defined]
    handler.send_header("Content-Length", "0")  # type: ignore[attr-defined]
    handler.end_headers()  # type: ignore[attr-defined]


def _range_of(header: str | None) -> tuple[int, int]:
    assert header is not None
    start, stop = header.removeprefix("bytes=").split("-")
    return int(start), int(stop) + 1


def test_damage_on_the_server_counts_as_damage_of_the_clip(
    root: Path, tmp_path: Path, copied: Callable[[Path], AbstractContextManager[ShardServer]]
) -> None:
    with copied(root) as server:
        tar = next(server.root.glob("train-000001.tar"))
        data = bytearray(tar.read_bytes())
        data[len(data) // 3] ^= 1
        tar.write_bytes(bytes(data))
        reader = open_remote(server, tmp_path).split("train")
        wrong = []
        for i in range(len(reader)):
            try:
                reader.read(i)
            except ShardError as error:
                assert not isinstance(error, RemoteError)
                wrong.append(str(error))
    assert len(wrong) == 1
    assert wrong[0].startswith(f"{server.url}/train-000001.tar: sample 'train-") and "damaged data" in wrong[0]


@pytest.mark.parametrize("index", ["index.safetensors", "train-000000.sums.safetensors"])
def test_a_wrong_manifest_or_index_is_asked_for_again(root: Path, tmp_path: Path, local: ShardSet, index: str) -> None:
    with serving(root) as server:
        hit = set[str]()

        def fault(name: str, number: int) -> str | None:
            if name in hit or name not in ("manifest.json", index):
                return None
            hit.add(name)
            return "digit"

        server.fault = fault
        assert open_remote(server, tmp_path).manifest == local.manifest
        assert server.named("manifest.json") == server.named(index) == 2


def test_a_tar_that_changes_under_the_run_ends_it(
    root: Path, tmp_path: Path, copied: Callable[[Path], AbstractContextManager[ShardServer]]
) -> None:
    with copied(root) as server:
        reader = open_remote(server, tmp_path).split("train")
        reader.read(0)
        tar = server.root / "train-000000.tar"
        tar.write_bytes(bytes(byte ^ 3 for byte in tar.read_bytes()))
        with pytest.raises(RemoteError, match=r"sample .train-0001.*the tar changed on the server"):
            reader.read(1)


def test_a_tar_of_another_size_ends_the_run(
    root: Path, tmp_path: Path, copied: Callable[[Path], AbstractContextManager[ShardServer]]
) -> None:
    with copied(root) as server:
        reader = open_remote(server, tmp_path).split("train")
        tar = server.root / "train-000000.tar"
        size = tar.stat().st_size
        tar.write_bytes(tar.read_bytes()[:-512])
        with pytest.raises(RemoteError, match=f"a file of {size - 512} bytes: expected {size}, the manifest's"):
            reader.read(0)


def test_a_manifest_that_changes_under_the_run_ends_it(
    root: Path, tmp_path: Path, copied: Callable[[Path], AbstractContextManager[ShardServer]]
) -> None:
    other = write_fake_shards(tmp_path / "other", clips=4, frames=9, flame=True, text_dim=6, seed=1)
    with copied(root) as server:
        reader = open_remote(server, tmp_path / "cache", FetchOptions(recheck=0.0, second=0.0)).split("train")
        reader.read(0)
        reader.read(0)
        assert server.named("manifest.json") == 2, "looked at again, with a mark"
        server.fault = lambda name, number: "500" if name == "manifest.json" else None
        reader.read(0)  # a server that is away is no change
        server.fault = lambda name, number: "changed" if name == "manifest.json" else None
        reader.read(0)  # nor are damaged bytes
        server.fault = lambda name, number: "digit" if name == "manifest.json" else None
        reader.read(0)  # and if they can be read
        server.fault = lambda name, number: None
        (server.root / "manifest.json").write_bytes((other / "manifest.json").read_bytes())
        with pytest.raises(
            RemoteError, match=r"/set/manifest.json: sha256 \w+: expected \w+, that of the set that was"
        ):
            reader.read(0)


@pytest.fixture
def copied(tmp_path: Path) -> Iterator[Callable[[Path], AbstractContextManager[ShardServer]]]:
    """A server of a copy of the set, which may be changed."""

    def serve(folder: Path) -> AbstractContextManager[ShardServer]:
        (tmp_path / "copy").mkdir()
        for path in folder.iterdir():
            (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
        return serving(tmp_path / "copy")

    yield serve
