"""Every kind of damage is one line that names the shard, the sample and what was expected."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_shards import fake_extractors, fake_sample, write_fake_shards
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


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


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


def replace_member(root: Path, name: str, data: bytes) -> None:
    """Put other bytes into a member, with checksums that agree, as a faulty writer would have done."""
    buffer = io.BytesIO()
    with tarfile.open(root / TAR) as old, tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as new:
        for info in old:
            content = data if info.name == name else old.extractfile(info).read()  # type: ignore[union-attr]
            info.size = len(content)
            new.addfile(info, io.BytesIO(content))
    (root / TAR).write_bytes(buffer.getvalue())
    index = json.loads((root / INDEX).read_bytes())
    with tarfile.open(root / TAR) as tar:
        for entry in index["samples"]:
            for member in entry["members"].values():
                info = tar.getmember(member["name"])
                content = tar.extractfile(info).read()  # type: ignore[union-attr]
                member.update(offset=info.offset_data, size=info.size, crc32=zlib.crc32(content))
    index["bytes"] = len(buffer.getvalue())
    (root / INDEX).write_text(json.dumps(index))
    seal(root)


def seal(root: Path) -> None:
    digest = hashlib.sha256((root / INDEX).read_bytes()).hexdigest()
    rewrite(root / MANIFEST, lambda m: m["files"][INDEX].update(sha256=digest))


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


def test_verify_sees_flips_outside_members_too(root: Path) -> None:
    data = bytearray((root / TAR).read_bytes())
    data[-1] ^= 1  # padding after the last member: no clip is touched
    (root / TAR).write_bytes(data)
    read_all(root)
    with pytest.raises(ShardError, match=TAR):
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
    replace_member(root, "train-0001.safetensors", save({k: v for k, v in clip.tensors().items() if k != "audio"}))
    assert "train-000000.tar: sample 'train-0001': audio: absent" in fault(root)


@pytest.mark.parametrize(
    ("field", "change", "named"),
    [
        ("video", lambda x: x.index_fill(0, torch.tensor([1]), float("nan")), "video: 256 values that are not finite"),
        ("video", lambda x: x[:, :, :3].contiguous(), "expected [3, 16, 4, 4]"),
        ("video", lambda x: x.double(), "dtype float64: expected float16 or bfloat16 or float32"),
        ("struct", lambda x: x[:2].contiguous(), "struct: shape [2, 4, 8]: expected [3, 4, 8]"),
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
    replace_member(root, "train-0000.safetensors", save({**tensors, field: change(tensors[field])}))
    message = fault(root)
    assert f"{TAR}: sample 'train-0000': {field}: " in message
    assert named in message


def test_foreign_bytes_are_not_executed_but_named(root: Path) -> None:
    replace_member(root, "train-0000.safetensors", b"\x80\x04\x95 not safetensors")
    assert "sample 'train-0000': train-0000.safetensors: " in fault(root)
    replace_member(root, "train-0000.json", b"[" * 100_000)
    replace_member(root, "train-0000.safetensors", save(ShardSet.open(root).split("train").read(1).tensors()))
    assert "sample 'train-0000'" in fault(root)


@pytest.mark.parametrize(
    ("key", "value"), [("shard_version", 2), ("identity", "else"), ("frames", 4), ("extractors", {}), ("meta", None)]
)
def test_record_that_disagrees(root: Path, key: str, value: Any) -> None:
    with tarfile.open(root / TAR) as tar:
        record = json.load(tar.extractfile("train-0002.json"))  # type: ignore[arg-type]
    record[key] = value
    replace_member(root, "train-0002.json", json.dumps(record).encode())
    message = fault(root)
    assert f"{TAR}: sample 'train-0002'" in message and key in message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.update(shard_version=2), "shard_version: 2: expected 1"),
        (lambda m: m.pop("statistics"), "statistics: absent"),
        (lambda m: m.update(frames=0), "frames: 0"),
        (lambda m: m["extractors"].pop("audio"), "extractors.audio"),
        (lambda m: m["extractors"]["motion"].update(width=-1), "extractors.motion.width: -1"),
        (lambda m: m["extractors"]["audio"].update(tag="other-v1"), "the manifest's tags"),
        (lambda m: m["extractors"]["video"].update(tag="unknown-v9"), "unknown-v9"),
        (lambda m: m["splits"]["train"].update(samples=4), "splits.train.samples: 4: expected 3"),
        (lambda m: m["splits"]["train"].update(shards=["../evil.tar"]), "'../evil.tar'"),
        (lambda m: m["splits"].pop("validation"), "validation"),
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
