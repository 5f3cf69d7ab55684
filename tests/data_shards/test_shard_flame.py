"""Statistics of FLAME: over valid slots of the train split, in every set that is written, and made for older ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fake_shards import fake_extractors, fake_sample, write_fake_shards
from helpers.people_shards import file_bytes
from helpers.shard_edits import rewrite_manifest, without_flame_statistics

from data_shards import edit
from data_shards.check import compare_statistics
from data_shards.reader import ShardSet
from data_shards.schema import ShardError
from data_shards.upgrade import upgrade
from data_shards.writer import ShardSetWriter

EXTRACTORS = fake_extractors(flame=True)


def expected_of(opened: ShardSet) -> dict[str, Any]:
    """By numpy, all rows at once."""
    reader, rows = opened.split("train"), []
    for index in range(len(reader)):
        clip = reader.read(index)
        assert clip.flame is not None and clip.flame_valid is not None
        values, valid = clip.flame.double().numpy(), clip.flame_valid.numpy()
        for frame in range(clip.frames):
            for slot in range(4):
                if valid[frame, slot] and (frame or slot == 3):
                    rows.append(values[frame, slot])
    return {"mean": np.mean(rows, 0), "std": np.std(rows, 0), "slots": len(rows)}


def assert_right(root: Path) -> None:
    opened = ShardSet.open(root)
    stored, expected = opened.manifest["statistics"]["flame"], expected_of(opened)
    for name in ("mean", "std"):
        np.testing.assert_allclose(stored[name], expected[name], rtol=1e-9)
    assert stored["slots"] == expected["slots"]
    assert not [entry for entry in compare_statistics(root) if entry.differs]


def write(root: Path, change: Any, clips: int = 3) -> Path:
    with ShardSetWriter(root, EXTRACTORS) as writer:
        for number in range(clips):
            clip = fake_sample(f"c{number}", f"p{number}", EXTRACTORS, frames=5, seed=number)
            writer.add("train", change(number, clip))
        writer.finish([], {})
    return root


def test_what_is_written(tmp_path: Path) -> None:
    assert_right(write_fake_shards(tmp_path / "a", clips=5, frames=5, flame=True))


def test_values_that_are_not_valid_have_no_say(tmp_path: Path) -> None:
    def garbage(number: int, clip: Any) -> Any:
        flame = clip.flame.clone()
        flame[1:][~clip.flame_valid[1:]] = 1e4
        return replace(clip, flame=flame)

    plain, other = write(tmp_path / "a", lambda number, clip: clip), write(tmp_path / "b", garbage)
    found = [ShardSet.open(root).manifest["statistics"]["flame"] for root in (plain, other)]
    assert found[0] == found[1]
    assert_right(other)


def test_a_clip_and_a_set_without_a_valid_slot(tmp_path: Path) -> None:
    def never(number: int, clip: Any, last: int) -> Any:
        return replace(clip, flame_valid=torch.zeros_like(clip.flame_valid)) if number < last else clip

    assert_right(write(tmp_path / "some", lambda number, clip: never(number, clip, 2)))
    root = write(tmp_path / "none", lambda number, clip: never(number, clip, 3))
    assert ShardSet.open(root).manifest["statistics"]["flame"] == {
        "mean": [0.0] * 56, "std": [1.0] * 56, "slots": 0
    }  # fmt: skip


def test_sets_out_of_sets(tmp_path: Path) -> None:
    one = write_fake_shards(tmp_path / "one", clips=8, frames=5, flame=True)
    two = write_fake_shards(tmp_path / "two", clips=4, frames=5, flame=True, seed=1)
    edit.merge(tmp_path / "merged", [one, two], prefix=True)
    edit.split(tmp_path / "merged", tmp_path / "dealt", validation=0.5, seed=4)
    edit.drop(one, tmp_path / "fewer", identities=["train-id01"])
    names = ("merged", "dealt", "fewer")
    for name in names:
        assert_right(tmp_path / name)
    means = {tuple(ShardSet.open(tmp_path / name).manifest["statistics"]["flame"]["mean"]) for name in names}
    assert len(means) == 3


def test_stats_tells_that_there_are_none(tmp_path: Path) -> None:
    root = without_flame_statistics(write_fake_shards(tmp_path / "a", clips=2, frames=5, flame=True))
    differing = [(entry.stream, entry.where) for entry in compare_statistics(root) if entry.differs]
    assert differing == [("flame", "only in the clips")]
    other = write_fake_shards(tmp_path / "b", clips=2, frames=5, flame=True)
    slots = ShardSet.open(other).manifest["statistics"]["flame"]["slots"]
    rewrite_manifest(other, lambda manifest: manifest["statistics"]["flame"].update(slots=slots - 1))
    differing = [(entry.stream, entry.where) for entry in compare_statistics(other) if entry.differs]
    assert differing == [("flame", f"slots {slots - 1}: expected {slots}")]


def test_sets_out_of_one_without_have_them(tmp_path: Path) -> None:
    root = without_flame_statistics(write_fake_shards(tmp_path / "a", clips=4, frames=5, flame=True))
    edit.drop(root, tmp_path / "b", keys=["train-0001"])
    assert_right(tmp_path / "b")


@pytest.mark.parametrize("shard_bytes", [1, 10**9])
def test_upgrade_gives_a_set_of_this_version_what_it_lacks(tmp_path: Path, shard_bytes: int) -> None:
    options: dict[str, Any] = {"clips": 4, "frames": 3, "flame": True, "text_dim": 5, "shard_bytes": shard_bytes}
    new = write_fake_shards(tmp_path / "new", **options)
    old = without_flame_statistics(write_fake_shards(tmp_path / "old", **options))
    (old / "notes.txt").write_text("of somebody")
    before, digest = file_bytes(old), ShardSet.open(old).hash
    manifest = upgrade(old, tmp_path / "out")
    assert file_bytes(tmp_path / "out") == file_bytes(new)
    assert file_bytes(old) == before
    assert manifest == ShardSet.open(tmp_path / "out").manifest and ShardSet.open(tmp_path / "out").hash == digest
    ShardSet.open(tmp_path / "out").verify()
    with pytest.raises(ShardError, match=r"shard_version: 3: expected an older one \(1, 2\) to upgrade"):
        upgrade(tmp_path / "out", tmp_path / "again")


def test_damage_is_found_on_the_way(tmp_path: Path) -> None:
    old = without_flame_statistics(write_fake_shards(tmp_path / "old", clips=3, frames=3, flame=True))
    for path in sorted(old.iterdir()):
        data = path.read_bytes()
        for position in range(0, len(data), len(data) // 9):
            path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
            with pytest.raises(ShardError, match=path.name):
                upgrade(old, tmp_path / "out")
            assert not (tmp_path / "out").exists()
        path.write_bytes(data)
    upgrade(old, tmp_path / "out")


def test_a_file_outside_the_set_is_not_copied(tmp_path: Path) -> None:
    old = without_flame_statistics(write_fake_shards(tmp_path / "old", clips=2, frames=3, flame=True))
    (tmp_path / "secret").write_text("x")
    entry = {"bytes": 1, "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"}
    rewrite_manifest(old, lambda manifest: manifest["files"].update({"../secret": entry}))
    manifest = upgrade(old, tmp_path / "out")
    assert "../secret" not in manifest["files"] and not (tmp_path / "out" / ".." / "secret.partial").exists()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"manifest.json", *manifest["files"]}
