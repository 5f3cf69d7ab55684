"""A set of an older version becomes, byte for byte, what this version would have written; the old one stays."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_shards import write_fake_shards
from helpers.shard_edits import age, rewrite, seal

import data_shards.upgrade
from data_shards.reader import ShardSet
from data_shards.schema import ShardError
from data_shards.upgrade import upgrade

TAR, INDEX = "train-000000.tar", "train-000000.index.json"


def contents(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(root.iterdir())}


@pytest.fixture(params=[1, 2])
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def old(tmp_path: Path, version: int) -> Path:
    return age(write_fake_shards(tmp_path / "old", clips=4, frames=3, flame=True, text_dim=5), version)


def change_index(root: Path, change: Any) -> None:
    """Let `change` alter the index of the first tar, with a manifest that agrees."""
    rewrite(root / INDEX, change)
    seal(root, INDEX, TAR)


@pytest.mark.parametrize("streams", [{}, {"flame": True, "text_dim": 5}], ids=["plain", "flame_text"])
@pytest.mark.parametrize("shard_bytes", [1, 10**9])
def test_the_result_is_what_this_version_writes(
    tmp_path: Path, version: int, streams: dict[str, Any], shard_bytes: int
) -> None:
    new = write_fake_shards(tmp_path / "new", clips=4, frames=3, shard_bytes=shard_bytes, **streams)
    old = write_fake_shards(tmp_path / "old", clips=4, frames=3, shard_bytes=shard_bytes, **streams)
    hash_before = ShardSet.open(old).hash
    before = contents(age(old, version))
    manifest = upgrade(old, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(new)
    assert contents(old) == before
    assert manifest == ShardSet.open(tmp_path / "out").manifest
    assert ShardSet.open(tmp_path / "out").hash == hash_before


def test_opening_an_old_set_names_the_way_out(old: Path, version: int) -> None:
    with pytest.raises(
        ShardError, match=rf"manifest.json: shard_version: {version}: expected 3 .*dualforce data upgrade OLD NEW"
    ):
        ShardSet.open(old)


@pytest.mark.parametrize("other", [4, 0, -1, True, None, "1", 1.0])
def test_other_versions_are_refused(old: Path, tmp_path: Path, other: Any) -> None:
    rewrite(old / "manifest.json", lambda m: m.update(shard_version=other))
    with pytest.raises(ShardError, match=r"shard_version: .*: expected an older one \(1, 2\) to upgrade"):
        upgrade(old, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_flipped_bit_of_a_tar_is_found(old: Path, tmp_path: Path) -> None:
    data = (old / TAR).read_bytes()
    for position in range(0, len(data), len(data) // 40):
        (old / TAR).write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(ShardError, match=f"{TAR}: sha256"):
            upgrade(old, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda i: i["samples"][1]["members"]["safetensors"].update(crc32=1), "sample 'train-0001': .*damaged data"),
        (lambda i: i["samples"][1]["members"]["json"].update(crc32=1), "sample 'train-0001': .*damaged data"),
        (lambda i: i["samples"][1]["members"]["json"].update(offset=-1), "members.json.offset: -1"),
        (lambda i: i["samples"][1]["tensors"]["audio"].update(dtype="float32"), "sample 'train-0001': tensors"),
        (lambda i: i["samples"][1]["tensors"]["audio"].update(crc32="0" * 24), "sample 'train-0001': tensors"),
        (lambda i: i["samples"][1]["tensors"]["audio"].update(offset=5), "sample 'train-0001': tensors"),
        (lambda i: i["samples"][1].update(frames=4), "sample 'train-0001': frames"),
        (lambda i: i["samples"][1].update(identity="else"), "sample 'train-0001': identity"),
        (lambda i: i["samples"][1].update(identity="train-id01"), "sample 'train-0001': identity"),
        (lambda i: i["samples"].pop(), r"splits.train.samples: 4: expected 3"),
        (lambda i: i["samples"].pop(1), "expected 512, in sequence|in sequence"),
        (lambda i: i.update(samples=7), "samples: 7: expected a list"),
        (lambda i: i["samples"].__setitem__(0, 7), "key: None"),
        (lambda i: i.update(shard_version=3), "shard_version: 3: expected [12]"),
        (lambda i: i["extractors"].update(audio="other"), "the manifest's tags"),
    ],
)
def test_an_index_that_lies_is_found(old: Path, tmp_path: Path, change: Any, named: str) -> None:
    change_index(old, change)
    with pytest.raises(ShardError, match=named) as caught:
        upgrade(old, tmp_path / "out")
    assert "\n" not in str(caught.value) and str(old) in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_tar_with_more_members_than_its_index_is_found(old: Path, tmp_path: Path) -> None:
    change_index(old, lambda index: index["samples"].pop())
    rewrite(old / "manifest.json", lambda m: m["splits"]["train"].update(samples=3))
    seal(old)
    with pytest.raises(ShardError, match=f"{TAR}: \\d+ bytes: expected|{TAR}: bytes behind the last member"):
        upgrade(old, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_changed_index_and_a_missing_tar(old: Path, tmp_path: Path) -> None:
    rewrite(old / INDEX, lambda index: index["samples"].pop())
    with pytest.raises(ShardError, match=rf"{INDEX}: sha256"):
        upgrade(old, tmp_path / "out")
    (old / "validation-000000.tar").unlink()
    change_index(old, lambda index: None)
    with pytest.raises(ShardError):
        upgrade(old, tmp_path / "out")


def test_places_where_no_set_may_go(old: Path, tmp_path: Path) -> None:
    before = contents(old)
    for out in (old / "inner", old / ".." / "old" / "inner", old):
        with pytest.raises(ShardError, match=r"inside the shard set|a shard set exists here"):
            upgrade(old, out)
    other = write_fake_shards(tmp_path / "other", clips=1)
    kept = contents(other)
    with pytest.raises(ShardError, match="a shard set exists here"):
        upgrade(old, other)
    assert contents(old) == before and contents(other) == kept


def test_a_killed_upgrade_is_no_set_and_can_be_repeated(
    old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("keep me")
    for name in ("train-000000.tar.partial", "train-000000.index.json", "train-000000.sums.safetensors",
                 "index.safetensors.partial", "manifest.json.partial"):  # fmt: skip
        (out / name).write_text("left by a killed process")
    (out / ".building").write_text("index\nmanifest\ntrain-000000\n")
    published = data_shards.upgrade.publish_shard

    def stop(root: Path, tar_name: str, clips: Any, digest: str) -> Any:
        if tar_name.startswith("validation"):
            raise KeyboardInterrupt
        return published(root, tar_name, clips, digest)

    with monkeypatch.context() as patch:
        patch.setattr(data_shards.upgrade, "publish_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            upgrade(old, out)
    assert os.listdir(out) == ["notes.txt"]
    upgrade(old, out)
    ShardSet.open(out).verify()
    assert hashlib.sha256((out / TAR).read_bytes()).digest() == hashlib.sha256((old / TAR).read_bytes()).digest()
    assert json.loads((out / "manifest.json").read_bytes())["shard_version"] == 3
