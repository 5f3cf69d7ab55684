"""The index of a set: columns that other tools read, checks at the speed of arrays, and the hash of the clips."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.fake_shards import fake_extractors, fake_sample, write_fake_shards
from helpers.shard_edits import change_index, rewrite_manifest
from safetensors.numpy import load, load_file

import data_shards.index
from data_shards.columns import decode_columns, encode_columns, header_of, size_of
from data_shards.reader import ShardSet
from data_shards.schema import ShardError
from data_shards.writer import ShardSetWriter

FORMS = {"a": ("U64", (2, 3)), "b": ("U32", (3,)), "c": ("U8", (5,))}


def test_columns_are_safetensors() -> None:
    columns = {
        "a": np.arange(6, dtype=np.uint64).reshape(2, 3) + np.uint64(2**63),
        "b": [1, 2, 2**32 - 1],
        "c": list(b"ab\ncd"),
    }
    data = encode_columns(FORMS, columns)
    assert len(data) == size_of(FORMS) and len(header_of(FORMS)) == 1024
    for found in (load(data), decode_columns(data, FORMS, "here", "a table")):
        assert found.keys() == columns.keys()
        assert all(np.array_equal(found[name], np.array(columns[name], found[name].dtype)) for name in columns)
        assert found["a"].shape == (2, 3)


def test_other_tools_read_index_and_checksums(tmp_path: Path) -> None:
    root = write_fake_shards(tmp_path, clips=3, frames=4, validation_clips=1)
    index, sums = load_file(root / "index.safetensors"), load_file(root / "train-000000.sums.safetensors")
    assert index["keys"].tobytes() == b"train-0000\ntrain-0001\ntrain-0002\nvalidation-0003\n"
    assert index["identity"].tolist() == [0, 0, 1, 0] and index["clips"].tolist() == [3, 1]
    assert sums["xxh3_64"].shape == (3, 1 + 1 + 4 * 4)  # record, reference, and four streams of four frames


def test_keys_whose_digests_are_equal_are_still_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_fake_shards(tmp_path, clips=4, frames=2)
    monkeypatch.setattr(data_shards.index, "xxh3_64_intdigest", lambda data: 7)
    assert len(ShardSet.open(root).split("train")) == 4
    change_index(root, lambda c: c.update(keys=c["keys"].replace(b"-0003", b"-0001", 1)))
    with pytest.raises(ShardError, match=r"train-000000.tar: sample 'train-0001': key: train-0001: expected a key"):
        ShardSet.open(root)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4096])
def test_keys_are_looked_at_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(data_shards.index, "_CHUNK", chunk)
    root = write_fake_shards(tmp_path, clips=5, frames=2, shard_bytes=1)
    opened = ShardSet.open(root)
    assert opened.split("train").keys == [f"train-{number:04d}" for number in range(5)]
    assert opened.split("validation").keys == ["validation-0005", "validation-0006"]
    change_index(root, lambda c: c.update(keys=c["keys"].replace(b"validation-0006", b"train-0000")))
    with pytest.raises(ShardError, match=r"validation-000001.tar: sample 'train-0000': key"):
        ShardSet.open(root)


def test_clips_of_several_dtypes_have_a_layout_each(tmp_path: Path) -> None:
    extractors = fake_extractors(text_dim=4)
    clips = [
        fake_sample(f"k{number}", "id", extractors, frames=3, seed=number, dtype=dtype)
        for number, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16, torch.float32))
    ]
    roots = []
    for name, order in (("one", (0, 1, 2, 3)), ("two", (0, 1, 2, 3))):
        with ShardSetWriter(tmp_path / name, extractors) as writer:
            for number in order:
                writer.add("train", clips[number])
            writer.finish([], {})
        roots.append(tmp_path / name)
    manifest = json.loads((roots[0] / "manifest.json").read_bytes())
    assert len(manifest["layouts"]) == 3 and manifest["layouts"] == sorted(manifest["layouts"])
    assert (roots[0] / "index.safetensors").read_bytes() == (roots[1] / "index.safetensors").read_bytes()
    reader = ShardSet.open(roots[0]).split("train")
    for number, clip in enumerate(clips):
        for frames in (1, 2, 3):
            found = reader.read(number, frames)
            assert found.video.dtype == clip.video.dtype and torch.equal(found.video, clip.video[:frames])
            assert torch.equal(found.text, clip.text) and torch.equal(found.struct, clip.struct[:frames])


def test_the_hash_is_that_of_the_clips_and_their_order(tmp_path: Path) -> None:
    def made(name: str, **changes: int) -> ShardSet:
        return ShardSet.open(write_fake_shards(tmp_path / name, **{"clips": 4, "frames": 2, **changes}))  # type: ignore[arg-type]

    one, same = made("one"), made("same")
    assert one.hash == same.hash and len(one.hash) == 64 and set(one.hash) <= set("0123456789abcdef")
    copy = Path(shutil.copytree(one.root, tmp_path / "elsewhere"))
    rewrite_manifest(copy, lambda m: m.update(info={"note": 1}, rejected=[]))
    assert ShardSet.open(copy).hash == one.hash
    others = [
        made("seed", seed=1),
        made("more", clips=5),
        made("less", validation_clips=1),
        made("tars", shard_bytes=1),
    ]
    assert len({one.hash, *(other.hash for other in others)}) == 5


def test_the_hash_is_as_documented(tmp_path: Path) -> None:
    root = write_fake_shards(tmp_path, clips=2, frames=2, shard_bytes=1)
    names = ["train-000000", "train-000001", "validation-000000", "validation-000001"]
    text = "".join(
        f"{name.split('-')[0]} {hashlib.sha256((root / f'{name}.tar').read_bytes()).hexdigest()}\n" for name in names
    )
    assert ShardSet.open(root).hash == hashlib.sha256(text.encode()).hexdigest()
