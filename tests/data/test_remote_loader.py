"""Training from a set on a server: the batches of the folder, and a server's fault that is no clip's."""

from __future__ import annotations

import json
import threading
from itertools import pairwise
from multiprocessing import Pipe
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.fake_shards import write_fake_shards
from helpers.launches import Launch, launch_all
from helpers.remote_sets import open_remote, same

from data_shards.reader import ShardSet
from data_shards.remote.fetch import FetchOptions, RemoteError
from data_shards.schema import ClipSample, ShardError
from dualforce.config import ConfigError, DataConfig, RunConfig
from dualforce.config_file import load_run
from dualforce.data.ahead import ReadAhead
from dualforce.data.loader import StepLoader
from dualforce.data.statistics import StreamStatistics
from dualforce.data.steps import Deal
from dualforce.data.workers import WorkerPool
from dualforce.train.__main__ import _prepare, open_shards
from dualforce.train.checkpoint import _check_same
from dualforce.types import ClipBatch
from tools.bench.fault_server import random_faults, serving

BRIEF = FetchOptions(attempts=2, first_wait=0.01, content_attempts=2)
RUN = Path(__file__).resolve().parents[2] / "ds_configs" / "runs" / "tiny.json"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_shards(tmp_path_factory.mktemp("set") / "set", clips=14, frames=5, shard_bytes=60_000)


def loader(shards: ShardSet, frames: int, stop: int = 6, **data: Any) -> StepLoader[list[ClipBatch]]:
    deal = Deal(
        StreamStatistics.from_manifest(shards.manifest), DataConfig(frames=frames, clips_per_step=6, **data),
        context=2, text_dim=4, seed=3, dp_rank=0, dp_size=1, micro_batch=3,
    )  # fmt: skip
    return StepLoader([shards], deal, 0, stop, lambda batches: batches)


def steps(shards: ShardSet, frames: int, **data: Any) -> list[list[ClipBatch]]:
    return list(loader(shards, frames, **data))


def equal(left: ClipBatch, right: ClipBatch) -> bool:
    for name, ours in left._asdict().items():
        theirs = getattr(right, name)
        if isinstance(ours, torch.Tensor):
            if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
                return False
        elif ours != theirs:
            return False
    return True


@pytest.mark.parametrize(("frames", "workers"), [(3, 0), (5, 0), (3, 2)])
def test_batches_of_a_faulty_server_are_those_of_the_folder(
    root: Path, tmp_path: Path, frames: int, workers: int
) -> None:
    wanted = steps(ShardSet.open(root), frames)
    assert len(wanted) == 6 and all(len(step) == 2 for step in wanted)
    with serving(root, random_faults(0.3, seed=frames)) as server:
        found = steps(open_remote(server, tmp_path), frames, workers=workers)
        assert sum(server.hits.values()) > 3
    pairs = [pair for ours, theirs in zip(found, wanted, strict=True) for pair in zip(ours, theirs, strict=True)]
    assert all(equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_slow_clip_holds_up_no_clip_of_the_next_step(root: Path, tmp_path: Path, workers: int) -> None:
    """The first clip of a step comes only when as many others were asked for as are not all of that step."""
    wanted, others = steps(ShardSet.open(root), 5), threading.Semaphore(0)
    options, came = FetchOptions(stall=60.0, least_stall=60.0, second=0.0), list[bool]()

    def fault(name: str, number: int) -> None:
        if not name.endswith(".tar"):
            return
        others.release()
        if len(came) == 0:
            came.append(False)
            came[0] = all(others.acquire(timeout=20) for _ in range(8))

    with serving(root) as server:
        ahead = loader(open_remote(server, tmp_path, options), 5, workers=workers)
        server.fault = fault
        found = list(ahead)
        assert came == [True]
        assert sum(request[0].endswith(".tar") for request in server.requests) == 14, "each clip once"
    pairs = [pair for ours, theirs in zip(found, wanted, strict=True) for pair in zip(ours, theirs, strict=True)]
    assert len(pairs) == 12 and all(equal(ours, theirs) for ours, theirs in pairs)


def test_no_more_than_the_next_step_is_begun_and_nothing_after_the_last(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: list[list[tuple[int, int]]] = []
    expect = ReadAhead.expect

    def recorded(ahead: ReadAhead[tuple[int, int], ClipSample], keys: list[tuple[int, int]]) -> None:
        expected.append(list(keys))
        expect(ahead, keys)

    monkeypatch.setattr(ReadAhead, "expect", recorded)
    with serving(root) as server:
        steps(open_remote(server, tmp_path), 5)
        assert [len(keys) for keys in expected] == [14, 14, 14, 14, 12, 6], "6 of the step and 8, one for each thread"
        for before, after in pairwise(expected):
            assert before[6:] == after[: len(before) - 6]
        expected.clear()
        steps(ShardSet.open(root), 5)
        assert [len(keys) for keys in expected] == [6] * 6, "a folder is read clip by clip"


@pytest.mark.parametrize(("count", "asked"), [(1, [(0, [1, 2, 3, 4]), (1, [2, 3, 4])]), (2, [(0, [2, 4]), (2, [4])])])
def test_a_process_is_told_which_steps_come_to_it(count: int, asked: list[tuple[int, list[int]]]) -> None:
    """Without the processes: what goes through their pipes."""
    pool = WorkerPool.__new__(WorkerPool)
    ours, theirs = Pipe()
    pool._count, pool._end, pool._pipes = count, 5, [theirs, theirs]
    for step, then in asked:
        pool._ask(step)
        found, further = ours.recv()
        assert (found, list(further)) == (step, then)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_is_away_ends_the_run_and_replaces_no_clip(root: Path, tmp_path: Path, workers: int) -> None:
    def away(name: str, number: int) -> str | None:
        return "500" if name.endswith(".tar") else None

    with serving(root) as server:
        ahead = loader(open_remote(server, tmp_path, BRIEF), 3, max_damaged=14, workers=workers)
        server.fault = away
        with pytest.raises(RemoteError, match=r"sample 'train-\d+': .*status 500"):
            list(ahead)
        assert ahead.damaged == []


def test_a_process_that_cannot_open_the_set_says_so(root: Path, tmp_path: Path) -> None:
    with serving(root) as server:
        ahead = loader(open_remote(server, tmp_path, BRIEF), 3, workers=1)
        server.fault = lambda name, number: "500"
        with pytest.raises(RemoteError, match=r"/set/manifest\.json: status 500"):
            list(ahead)


def test_damage_on_the_server_is_replaced_in_a_process_too(tmp_path: Path) -> None:
    copy = write_fake_shards(tmp_path / "set", clips=14, frames=5)
    tar = copy / "train-000000.tar"
    data = bytearray(tar.read_bytes())
    data[len(data) // 3] ^= 1
    tar.write_bytes(bytes(data))
    with serving(copy) as server:
        for workers in (0, 1):
            ahead = loader(open_remote(server, tmp_path / f"cache{workers}", BRIEF), 5, max_damaged=1, workers=workers)
            assert len(list(ahead)) == 6
            assert len(ahead.damaged) == 1 and ahead.damaged[0].reason.startswith(f"{server.url}/train-000000.tar: ")


def test_checksums_that_changed_on_the_server_are_no_damage_of_a_clip(root: Path, tmp_path: Path) -> None:
    def changed(name: str, number: int) -> str | None:
        return "changed_mark" if "sums" in name else None

    with serving(root) as server:
        ahead = loader(open_remote(server, tmp_path, BRIEF, most=1), 3, max_damaged=14)
        server.fault = changed
        with pytest.raises(RemoteError, match=r"\.sums\.safetensors: sha256 \w+: expected \w+, the manifest's"):
            list(ahead)
        assert ahead.damaged == []


def test_a_reader_can_be_handed_to_a_process(root: Path, tmp_path: Path) -> None:
    with serving(root) as server:
        reader = open_remote(server, tmp_path).split("train")
        reader.read(0)
        handed = ForkingPickler.loads(ForkingPickler.dumps(reader))
        asked, local = len(server.requests), ShardSet.open(root).split("train")
        assert all(same(handed.read(i), local.read(i)) for i in range(len(local)))
        assert len(server.requests) - asked == len(local) - 1


def test_what_is_secret_in_a_url_does_not_reach_the_files_of_a_run(root: Path, tmp_path: Path) -> None:
    with serving(root) as server:
        url = f"http://me:hunter2@{server.host}/set?sig=s3cret"
        run = load_run(RUN, [f"data.shards={url}", f"data.cache={tmp_path}"])
        buckets, told = open_shards(run)
        assert len(buckets.sets[0].split("train")) == 14 and server.requests[-1][2] is not None
    assert told.data.shards == server.url and "hunter2" not in repr(told) and "s3cret" not in repr(told)
    with pytest.raises(ShardError, match=r"data\.cache: absent"):
        open_shards(load_run(RUN, [f"data.shards={url}"]))
    for refused in ("pipe:cat x", "ftp://host/set"):
        with pytest.raises(ShardError, match=rf"data\.shards: {refused}: expected a folder, or a URL of http, https"):
            open_shards(load_run(RUN, [f"data.shards={refused}"]))
    local, told = open_shards(load_run(RUN, [f"data.shards={root}"]))
    assert local.sets[0].root == root and told.data.shards == str(root)


@pytest.mark.parametrize("item", ["data.shards={url}", "{url}", "train.steps.x={url}", 'data={{"shards": "{url}"}}'])
def test_what_is_secret_in_a_url_is_in_no_error_of_a_run_file(item: str) -> None:
    text = item.format(url="https://me:hunter2@host/set?sig=s3cret")
    with pytest.raises(ConfigError) as caught:
        load_run(RUN, [text, "train.steps=0"])
    assert "hunter2" not in str(caught.value) and "s3cret" not in str(caught.value) and "--set" in str(caught.value)


def test_a_run_goes_on_with_what_may_be_written(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes the job and the files is given the URL without secrets."""
    given: list[RunConfig] = []

    def prepare(run: RunConfig, *rest: Any) -> tuple[None, int]:
        given.append(run)
        return None, 0

    monkeypatch.setattr("dualforce.launch.start", lambda *sizes: SimpleNamespace(rank=0, world=1))
    monkeypatch.setattr("dualforce.train.setup.prepare_job", prepare)
    with serving(root) as server:
        values = [f"data.shards=http://me:hunter2@{server.host}/set?sig=s3cret", f"data.cache={tmp_path / 'cache'}"]
        _prepare(load_run(RUN, [*values, "data.frames=5"]), tmp_path, False)
    written = (tmp_path / "config.json").read_text()
    for text in (written, repr(given)):
        assert server.url in text and "hunter2" not in text and "s3cret" not in text


def test_a_resumed_run_may_keep_bytes_elsewhere() -> None:
    def state(**data: Any) -> Any:
        run = load_run(RUN, [f"data.{key}={value}" for key, value in data.items()]).model_dump(mode="json")
        return SimpleNamespace(world=1, sequence=1, zero_stage=2, optimizer="", units={}, engine={}, step=1, run=run)

    first = state(shards="https://host/set", cache="/a")
    _check_same(first, state(shards="s3://bucket/set", cache="/b", cache_gib=5.0), Path("run"))
    with pytest.raises(ConfigError, match=r"data\.clips_per_step"):
        _check_same(first, state(clips_per_step=2), Path("run"))


@pytest.mark.slow
def test_a_run_on_a_faulty_server_and_its_resumption_give_the_losses_of_the_folder(tmp_path: Path) -> None:
    root = write_fake_shards(tmp_path / "set", clips=14, frames=5)
    common = ["data.frames=5", "data.clips_per_step=2", "train.steps=4", "train.validation_sigmas=1",
              "train.log_every=1", "data.workers=1"]  # fmt: skip
    with serving(root, random_faults(0.15, 4, ("500", "reset", "short"))) as server:
        url = f"data.shards=http://me:hunter2@{server.host}/set?sig=s3cret"

        def run(name: str, *values: str, resume: bool = False) -> None:
            settings = [part for value in (*common, *values) for part in ("--set", value)]
            arguments = ["--run", str(RUN), "--out", str(tmp_path / name), *settings, *["--resume"] * resume]
            outcome = launch_all([Launch(name, 1, arguments)])[name]
            assert outcome.ok and "hunter2" not in outcome.show() and "s3cret" not in outcome.show(), outcome.show()

        run("local", f"data.shards={root}")
        run("remote", url, f"data.cache={tmp_path / 'one'}", "train.stop_at=2")
        run("remote", url, f"data.cache={tmp_path / 'two'}", resume=True)
        assert sum(server.hits.values()) > 3
    ours, theirs = (
        {record["step"]: record["total"] for record in map(json.loads, (tmp_path / name / "metrics.jsonl").open())
         if record["kind"] == "train"} for name in ("remote", "local")
    )  # fmt: skip
    assert ours == theirs and len(ours) == 4
    files = [path for path in (tmp_path / "remote").rglob("*") if path.is_file()]
    assert len(files) > 5 and not [
        path for path in files for word in (b"hunter2", b"s3cret") if word in path.read_bytes()
    ]


def test_a_url_in_a_run_file_stays_one(tmp_path: Path) -> None:
    def load(**data: Any) -> DataConfig:
        values = {"extends": str(RUN), "data": data}
        (tmp_path / "run.json").write_text(json.dumps(values))
        return load_run(tmp_path / "run.json").data

    assert load(shards="https://host/set", cache="kept").shards == "https://host/set"
    assert Path(load(shards="s3://bucket/set", cache="kept").cache) == tmp_path / "kept"
    assert load(shards="pipe:cat x").shards == "pipe:cat x"  # for the reader to refuse as it is
    assert Path(load(shards="set").shards) == tmp_path / "set" and load(shards="set").cache is None
    with pytest.raises(ConfigError, match=r"data\.cache_gib"):
        load(cache_gib=0.0)
