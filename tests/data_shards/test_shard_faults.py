"""Every kind of damage is one line that names the shard, the sample and what was expected."""

from __future__ import annotations

import json
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_shards import fake_extractors, fake_sample, replace_member, rewrite, write_fake_shards
from safetensors.torch import save

from data_shards.reader import ShardSet
from data_shards.schema import ShardError
from data_shards.writer import ShardSetWriter

TAR, INDEX, MANIFEST = "train-000000.tar", "train-000000.index.json", "manifest.json"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_shards(tmp_path_factory.mktemp("pristine"), clips=3, frames=3)


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "shards"))


def read_all(root: Path) -> None:
    opened = ShardSet.open(root)
    for split in ("train", "validation"):
        reader = opened.split(split)
        for index in range(len(reader)):
            reader.read(index)


def fault(root: Path) -> str:
    with pytest.raises(ShardError) as caught:
        read_all(root)
    message = str(caught.value)
    assert "\n" not in message
    assert "expected" in message
    return message


def test_a_whole_set_has_no_fault(root: Path) -> None:
    read_all(root)
    ShardSet.open(root).verify()


def test_flipped_bits_in_members_are_always_named(root: Path) -> None:
    data = (root / TAR).read_bytes()
    index = json.loads((root / INDEX).read_bytes())
    dice = random.Random(0)
    members = [(i, m) for i, entry in enumerate(index["samples"]) for m in entry["members"].values()]
    for _ in range(100):
        number, member = dice.choice(members)
        broken = bytearray(data)
        broken[member["offset"] + dice.randrange(member["size"])] ^= 1 << dice.randrange(8)
        (root / TAR).write_bytes(broken)
        with pytest.raises(ShardError, match="damaged data") as caught:
            ShardSet.open(root).split("train").read(number)
        assert TAR in str(caught.value) and member["name"] in str(caught.value)


def test_flips_outside_members_are_found_too(root: Path) -> None:
    data = (root / TAR).read_bytes()
    members = [m for e in json.loads((root / INDEX).read_bytes())["samples"] for m in e["members"].values()]
    behind = [m["offset"] + m["size"] for m in members if m["size"] % 512]
    for position in (*(m["offset"] - 512 for m in members), *(m["offset"] - 1 for m in members), *behind):
        broken = bytearray(data)
        broken[position] ^= 1
        (root / TAR).write_bytes(broken)
        assert TAR in fault(root), position
    (root / TAR).write_bytes(data[:-1] + b"\1")  # behind the last member, where no clip is
    with pytest.raises(ShardError, match=f"{TAR}: sha256"):
        ShardSet.open(root).verify()


def test_every_truncation_is_found_on_opening(root: Path) -> None:
    data = (root / TAR).read_bytes()
    dice = random.Random(1)
    for size in [0, 1, 511, 512, len(data) - 1, *(dice.randrange(len(data)) for _ in range(60))]:
        (root / TAR).write_bytes(data[:size])
        with pytest.raises(ShardError, match="truncated") as caught:
            ShardSet.open(root)
        assert TAR in str(caught.value) and str(len(data)) in str(caught.value)


def test_truncation_after_opening_names_the_sample(root: Path) -> None:
    reader = ShardSet.open(root).split("train")
    (root / TAR).write_bytes((root / TAR).read_bytes()[:2000])
    with pytest.raises(ShardError, match=r"train-000000.tar: sample 'train-0002': .*truncated"):
        reader.read(2)


@pytest.mark.parametrize("name", [TAR, INDEX, MANIFEST])
def test_missing_file_is_named(root: Path, name: str) -> None:
    (root / name).unlink()
    assert name in fault(root)


def test_missing_tensor(root: Path) -> None:
    clip = ShardSet.open(root).split("train").read(1)
    replace_member(root, TAR, "train-0001.safetensors", save({k: v for k, v in clip.tensors().items() if k != "audio"}))
    assert f"{INDEX}: sample 'train-0001': tensors.audio: absent" in fault(root)


@pytest.mark.parametrize(
    ("field", "change", "named"),
    [
        ("video", lambda x: x.index_fill(0, torch.tensor([1]), float("nan")), "video: 256 values that are not finite"),
        ("video", lambda x: x[:, :, :3].contiguous(), "expected [3, 16, 4, 4]"),
        ("video", lambda x: x.double(), "dtype float64: expected float16 or bfloat16 or float32"),
        ("struct", lambda x: x[:2].contiguous(), "tensors.struct.shape: [2, 4, 8]: expected 3 latent frames"),
        ("struct", lambda x: x.half(), "dtype float16: expected float32"),
        ("audio", lambda x: torch.full_like(x, float("inf")), "audio: 288 values that are not finite"),
        ("audio", lambda x: x.roll(1, dims=1), "audio: slots 0 to 6 of frame 0 differ"),
        ("voiced", lambda x: x.to(torch.uint8), "dtype uint8: expected bool"),
    ],
)
def test_wrong_tensor_is_named(
    root: Path, field: str, change: Callable[[torch.Tensor], torch.Tensor], named: str
) -> None:
    tensors = ShardSet.open(root).split("train").read(0).tensors()
    replace_member(root, TAR, "train-0000.safetensors", save({**tensors, field: change(tensors[field])}))
    message = fault(root)
    assert "train-000000." in message and "sample 'train-0000': " in message and field in message
    assert named in message


def test_foreign_bytes_are_not_executed_but_named(root: Path) -> None:
    size = len(save(ShardSet.open(root).split("train").read(0).tensors()))
    replace_member(root, TAR, "train-0000.safetensors", b"\x80\x04\x95 not safetensors".ljust(size))
    assert "sample 'train-0000': train-0000.safetensors: " in fault(root)
    replace_member(root, TAR, "train-0000.json", b"[" * 100_000)
    replace_member(root, TAR, "train-0000.safetensors", save(ShardSet.open(root).split("train").read(1).tensors()))
    assert "sample 'train-0000'" in fault(root)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shard_version", 2),
        ("shard_version", True),
        ("identity", "else"),
        ("frames", 4),
        ("extractors", {}),
        ("meta", 0),
    ],
)
def test_record_that_disagrees(root: Path, key: str, value: Any) -> None:
    with tarfile.open(root / TAR) as tar:
        record = json.load(tar.extractfile("train-0002.json"))  # type: ignore[arg-type]
    record[key] = value
    replace_member(root, TAR, "train-0002.json", json.dumps(record).encode())
    message = fault(root)
    assert f"{TAR}: sample 'train-0002'" in message and key in message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.update(shard_version=3), "shard_version: 3: expected 2"),
        (lambda m: m.update(shard_version=1), "shard_version: 1: expected 2 (make a set of this version with: "),
        (lambda m: m.pop("statistics"), "statistics: absent"),
        (lambda m: m.update(frames=0), "frames: 0"),
        (lambda m: m["extractors"].pop("audio"), "extractors.audio"),
        (lambda m: m["extractors"]["motion"].update(width=-1), "extractors.motion.width: -1"),
        (lambda m: m["extractors"]["audio"].update(tag="other-v1"), "the manifest's tags"),
        (lambda m: m["extractors"]["video"].update(tag="unknown-v9"), "unknown-v9"),
        (lambda m: m["splits"]["train"].update(samples=4), "splits.train.samples: 4: expected 3"),
        (lambda m: m["splits"]["train"].update(shards=["../evil.tar"]), "'../evil.tar'"),
        (lambda m: m["splits"].pop("validation"), "validation"),
        (lambda m: m["splits"]["train"]["identities"].pop(), "identity: train-id01: expected one that the manifest"),
        (lambda m: m["splits"]["train"]["identities"].append("x"), "identities: 'x': expected one that has a clip"),
        (lambda m: m.update(frames=5), "expected 5"),
    ],
)
def test_wrong_manifest(root: Path, change: Callable[[dict[str, Any]], None], named: str) -> None:
    rewrite(root / MANIFEST, change)
    assert named in fault(root)


def test_manifest_that_is_not_json(root: Path) -> None:
    (root / MANIFEST).write_text('{"shard_version": NaN')
    assert "manifest.json" in fault(root)
    (root / MANIFEST).write_text("[]")
    assert "expected a JSON object" in fault(root)


def test_changed_index_is_found(root: Path) -> None:
    rewrite(root / INDEX, lambda index: index["samples"][0]["members"]["json"].update(offset=0))
    assert f"{INDEX}: sha256" in fault(root)


def test_shard_of_another_set_is_refused(root: Path, tmp_path: Path) -> None:
    extractors = fake_extractors()
    extractors["motion"]["tag"] = "other-motion-v1"
    other = tmp_path / "other"
    with ShardSetWriter(other, extractors) as writer:
        writer.add("train", fake_sample("a", "id", extractors, frames=3))
        writer.finish([], {})
    for name in (TAR, INDEX):
        shutil.copy(other / name, root / name)
    message = fault(root)
    assert "other-motion-v1" in message and "random-motion-v1" in message


def test_unknown_split_and_index(root: Path) -> None:
    with pytest.raises(ShardError, match="'test': expected one of train, validation"):
        ShardSet.open(root).split("test")
    for index in (-1, 3):
        with pytest.raises(IndexError):
            ShardSet.open(root).split("train").read(index)
