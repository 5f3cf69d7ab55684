"""A build removes nothing from the folder of the shards that it has not made."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.clips import sidecar_json, textured, tone, write_sidecar

from data_shards import manifest
from data_shards.reader import ShardSet
from data_shards.schema import ShardError
from dualforce.codecs.media import write_video
from dualforce.preprocess.build import BuildOptions, build_shards
from dualforce.preprocess.errors import BuildError

OPTIONS = BuildOptions(size=64)


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "a.mp4", textured(82), tone(84))
    write_sidecar(folder / "a.mp4", sidecar_json(82, identity="a"))
    return folder


def test_shards_of_others_are_not_removed(src: Path, tmp_path: Path) -> None:
    """A WebDataset has names like these, and no manifest."""
    out = tmp_path / "out"
    out.mkdir()
    before = {"train-000000.tar": b"theirs", "index.safetensors": b"theirs", "train-000001.tar.partial": b"theirs"}
    for name, data in before.items():
        (out / name).write_bytes(data)
    with pytest.raises(BuildError, match=r"index\.safetensors: exists, .*: expected a new or empty folder"):
        build_shards(src, out, OPTIONS)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_more_people_than_a_set_may_have_are_refused_before_a_video_is_read(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(src, tmp_path / "clips")
    for number in range(3):
        shutil.copy(src / "a.mp4", tmp_path / "clips" / f"{number}.mp4")
        write_sidecar(tmp_path / "clips" / f"{number}.mp4", sidecar_json(82, identity=f"p{number}"))
    (tmp_path / "who.json").write_text('{"a": "a", "0": "p0", "1": "p1", "2": "a"}')
    monkeypatch.setattr(manifest, "MAX_JSON_VALUES", manifest.RESERVE[1] + 2 + 7)
    monkeypatch.setattr("dualforce.preprocess.plan.hash_file", lambda path: pytest.fail("a video was read"))
    for identities, people in ((None, 4), (tmp_path / "who.json", 3)):
        with pytest.raises(ShardError, match=rf"clips: {people} identities in 1 tars: .*: expected at most"):
            build_shards(tmp_path / "clips", tmp_path / "out", BuildOptions(size=64, identities=identities))
    assert not list(tmp_path.glob("out/**/*.tar"))


def test_a_file_is_one_line(src: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(BuildError, match=r"out: is a file: expected a folder"):
        build_shards(src, tmp_path / "out", OPTIONS)
    assert (tmp_path / "out").read_text() == "mine"


def test_other_files_are_no_hindrance(src: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    build_shards(src, out, OPTIONS)
    assert len(ShardSet.open(out).split("train")) == 1 and (out / "notes.txt").read_text() == "mine"


def test_a_move_that_fails_leaves_nothing_that_hinders_the_next_build(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the work in another folder, none stays in `out` to tell whose the shards are."""
    out, original = tmp_path / "out", os.replace
    options = BuildOptions(size=64, work=tmp_path / "work")

    def stop_at_manifest(old: Any, new: Any) -> None:
        if Path(new) == out / "manifest.json":
            raise RuntimeError
        original(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_at_manifest)
        with pytest.raises(RuntimeError):
            build_shards(src, out, options)
    assert not list(out.glob("*.safetensors")) and not list(out.glob("*.tar"))
    build_shards(src, out, options)
    assert len(ShardSet.open(out).split("train")) == 1
