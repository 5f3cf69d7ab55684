"""Whoever writes a set clears away what a killed build of sets has left, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.fake_shards import fake_extractors, fake_sample, write_fake_shards
from helpers.shard_edits import age

from data_shards.claim import MARK
from data_shards.reader import ShardSet
from data_shards.schema import ShardError
from data_shards.upgrade import upgrade
from data_shards.writer import ShardSetWriter

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = ("train-000000.tar", "train-000007.tar.partial", "validation-000000.sums.safetensors", "index.safetensors",
           "train-000003.index.json", "manifest.json.partial")  # fmt: skip
SET = ["index.safetensors", "manifest.json", "train-000000.sums.safetensors", "train-000000.tar"]
CHILD = """
import os, signal, sys
from pathlib import Path
from helpers.fake_shards import write_fake_shards
from data_shards import shard, upgrade
name, out = sys.argv[1:3]
module, function = (shard, "publish_shard") if name == "write" else (upgrade, "publish_shard")
real, calls = getattr(module, function), []
def last(*arguments):
    calls.append(real(*arguments))
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return calls[-1]
setattr(module, function, last)
if name == "write":
    write_fake_shards(Path(out), clips=4, shard_bytes=1)
else:
    upgrade.upgrade(Path(sys.argv[3]), Path(out))
"""


def write(out: Path, old: Path) -> None:
    write_fake_shards(out, clips=1, validation_clips=0)


def make_upgrade(out: Path, old: Path) -> None:
    upgrade(old, out)


MAKERS = {"write": write, "upgrade": make_upgrade}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of version 2 with two tars."""
    return age(write_fake_shards(tmp_path_factory.mktemp("old"), clips=1, validation_clips=1), 2)


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others_are_refused_and_stay(
    tmp_path: Path, old: Path, make: Callable[[Path, Path], None], name: str
) -> None:
    """A WebDataset of somebody else has names like these, and no manifest."""
    (tmp_path / name).write_bytes(b"theirs")
    with pytest.raises(ShardError, match=rf"{name}: exists, .* no interrupted build .*: expected a new or"):
        make(tmp_path, old)
    assert contents(tmp_path) == {name: b"theirs"}


@pytest.mark.parametrize("victim", MAKERS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_what_a_killed_build_left_is_cleared_away(
    tmp_path: Path, old: Path, victim: str, make: Callable[[Path, Path], None]
) -> None:
    out = tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, "-c", CHILD, victim, str(out), str(old)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
    )
    assert killed.returncode == -signal.SIGKILL
    left = sorted(path.name for path in out.iterdir())
    assert MARK in left and len([name for name in left if name.endswith(".tar")]) == 2
    # Their tar came later: it is not the killed build's, and what is stays until somebody looks.
    (out / "train-000099.tar").write_bytes(b"theirs")
    with pytest.raises(ShardError, match=r"train-000099\.tar: exists"):
        make(out, old)
    assert sorted(path.name for path in out.iterdir()) == sorted([*left, "train-000099.tar"])
    (out / "train-000099.tar").unlink()
    (out / "notes.txt").write_text("mine")
    make(out, old)
    ShardSet.open(out).verify()
    made = {path.name for path in out.iterdir()}
    assert made >= {*SET, "notes.txt"} and MARK not in made
    assert made - {"notes.txt"} == {"manifest.json", *ShardSet.open(out).manifest["files"]}


def test_a_folder_whose_mark_stayed_behind_is_a_set(tmp_path: Path, old: Path) -> None:
    """The process was killed between the manifest and the end."""
    write(tmp_path, old)
    (tmp_path / MARK).write_text("train-000000\n")
    before = contents(tmp_path)
    for make in MAKERS.values():
        with pytest.raises(ShardError, match="a shard set exists here"):
            make(tmp_path, old)
    assert contents(tmp_path) == before
    ShardSet.open(tmp_path).verify()


@pytest.mark.parametrize("second_is_done", [True, False])
def test_a_writer_that_was_taken_for_killed_leaves_the_set_of_the_next(tmp_path: Path, second_is_done: bool) -> None:
    extractors = fake_extractors()
    with (
        pytest.raises(ShardError, match="another process writes a set here now"),
        ShardSetWriter(tmp_path, extractors) as first,
    ):
        first.add("train", fake_sample("a", "one", extractors))
        second = ShardSetWriter(tmp_path, extractors)
        second.add("train", fake_sample("b", "two", extractors))
        if second_is_done:
            second.finish([], {})
        first.finish([], {})
    if not second_is_done:
        second.finish([], {})
    ShardSet.open(tmp_path).verify()
    assert ShardSet.open(tmp_path).split("train").keys == ["b"]


@pytest.mark.parametrize("module", ["writer", "upgrade"])
def test_no_manifest_without_its_shards(
    tmp_path: Path, old: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """Where the last step fails, or Ctrl-C comes before it, all of the set goes."""

    def interrupted(root: Path) -> None:
        assert (root / "manifest.json").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(f"data_shards.{module}.sync_folder", interrupted)
    with pytest.raises(KeyboardInterrupt):
        MAKERS["write" if module == "writer" else module](tmp_path, old)
    assert contents(tmp_path) == {}


def test_a_shard_is_told_of_on_the_disk_before_its_first_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or, after a power cut, the next build would take it for somebody else's."""
    told: list[str] = []
    sync = os.fsync

    def synced(file: int) -> None:
        if os.path.samestat(os.fstat(file), os.stat(tmp_path / MARK)):
            text = (tmp_path / MARK).read_text()
            last = text.split()[-1]
            assert not [path for path in tmp_path.iterdir() if path.name.startswith(f"{last}.")]
            told.append(text)
        sync(file)

    monkeypatch.setattr(os, "fsync", synced)
    extractors = fake_extractors()
    with ShardSetWriter(tmp_path, extractors, shard_bytes=1) as writer:
        for number in range(2):
            writer.add("train", fake_sample(f"k{number}", "one", extractors))
    assert [text.split()[1:] for text in told] == [
        ["index", "manifest"],
        ["index", "manifest", "train-000000"],
        ["index", "manifest", "train-000000", "train-000001"],
    ]


def test_a_block_that_fails_removes_what_it_has_made_and_no_more(tmp_path: Path) -> None:
    extractors = fake_extractors()
    with pytest.raises(KeyboardInterrupt), ShardSetWriter(tmp_path, extractors, shard_bytes=1) as writer:
        for number in range(3):
            writer.add("train", fake_sample(f"k{number}", "one", extractors))
        (tmp_path / "train-000044.tar").write_bytes(b"theirs")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"train-000044.tar": b"theirs"}
