"""A full disk ends the commands that write sets with one line, nothing of the set is left, and the next try works."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.people_shards import file_bytes, write_people
from helpers.shard_edits import age, without_flame_statistics

from data_shards import files
from data_shards.edit import drop, merge, split
from data_shards.reader import ShardSet
from data_shards.schema import ShardError
from data_shards.upgrade import upgrade

Make = Callable[[Path, Path], object]
EDITS: dict[str, Make] = {
    "merge": lambda root, out: merge(out, [root, root.parent / "other"]),
    "split": lambda root, out: split(root, out, validation=0.5),
    "drop": lambda root, out: drop(root, out, keys=["ann-w0"]),
}
OLD: dict[str, Callable[[Path], Path]] = {
    "version-1": lambda root: age(write_people(root), 1),
    "version-2": lambda root: age(write_people(root), 2),
    "without-flame": lambda root: without_flame_statistics(write_people(root, flame=True)),
}
LINE = "No space left on device: expected a place with room, where files can be written"


def full(*_: object) -> None:
    """Stands for a function that writes."""
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("maker", EDITS)
@pytest.mark.parametrize("writes", ["data_shards.shard.TarWriter.write", "data_shards.shard.publish",
                                    "data_shards.writer.publish"])  # fmt: skip
def test_sets_made_out_of_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, maker: str, writes: str) -> None:
    root, out = write_people(tmp_path / "set"), tmp_path / "out"
    write_people(tmp_path / "other", train=("dan",), validation=())
    before = file_bytes(root)
    with monkeypatch.context() as patch:
        patch.setattr(writes, full)
        with pytest.raises(ShardError, match=re.escape(f"{out}: {LINE}")):
            EDITS[maker](root, out)
    assert not out.exists() and file_bytes(root) == before
    EDITS[maker](root, out)
    ShardSet.open(out).verify()


@pytest.mark.parametrize("old", OLD)
def test_upgrade_blames_the_new_set_and_not_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str) -> None:
    root, out = OLD[old](tmp_path / "set"), tmp_path / "out"
    for owner, name, named in ((files, "_write", rf"{out}/[a-z0-9.-]*"), (files.os, "fsync", rf"{out}/?[a-z0-9.-]*")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(ShardError, match=f"^{named}: {LINE}"):
                upgrade(root, out)
        assert not out.exists()
    upgrade(root, out)
    ShardSet.open(out).verify()


def test_what_a_killed_command_leaves_is_told_apart(tmp_path: Path) -> None:
    root, out = write_people(tmp_path / "set"), tmp_path / "out"
    out.mkdir()
    (out / "train-000000.tar.partial").touch()
    with pytest.raises(ShardError, match=r"expected a new folder$"):
        split(root, out, validation=0.5)
    (out / ".building").touch()
    with pytest.raises(ShardError, match=r"exists: .* as a command that was killed leaves them: remove it"):
        split(root, out, validation=0.5)
    (out / "notes.txt").touch()
    with pytest.raises(ShardError, match=r"expected a new folder$"):
        split(root, out, validation=0.5)
