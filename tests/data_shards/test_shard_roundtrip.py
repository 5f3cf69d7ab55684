"""What is written comes back bit for bit, through this package and through plain tar and webdataset."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
import webdataset
from helpers.fake_shards import fake_extractors, fake_sample, write_fake_shards
from safetensors.torch import load

from data_shards.reader import ShardSet
from data_shards.schema import ClipSample
from data_shards.writer import ShardSetWriter


def assert_same_clip(got: ClipSample, want: ClipSample) -> None:
    assert (got.key, got.identity, got.meta) == (want.key, want.identity, want.meta)
    assert got.tensors().keys() == want.tensors().keys()
    for name, tensor in want.tensors().items():
        assert got.tensors()[name].dtype == tensor.dtype, name
        assert torch.equal(got.tensors()[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("flame", "text_dim"), [(False, None), (True, 6)], ids=["plain", "flame_text"])
def test_round_trip_is_bitwise(tmp_path: Path, dtype: torch.dtype, flame: bool, text_dim: int | None) -> None:
    extractors = fake_extractors(height=3, width=5, flame=flame, text_dim=text_dim)
    clips = [fake_sample(f"-clip_{i}", f"id{i}", extractors, frames=3, seed=i, dtype=dtype) for i in range(3)]
    with ShardSetWriter(tmp_path, extractors) as writer:
        for clip in clips:
            writer.add("train", clip)
        returned = writer.finish([{"source": "bad.mp4", "reason": "R_NOFACE", "detail": "frame 3"}], {"tool": "test"})
    opened = ShardSet.open(tmp_path)
    assert opened.manifest == returned == json.loads((tmp_path / "manifest.json").read_bytes())
    assert opened.manifest["rejected"] == [{"source": "bad.mp4", "reason": "R_NOFACE", "detail": "frame 3"}]
    reader = opened.split("train")
    assert (len(reader), reader.keys, reader.frames) == (3, [clip.key for clip in clips], 3)
    assert len(opened.split("validation")) == 0
    for index, clip in enumerate(clips):
        assert_same_clip(reader.read(index), clip)
    opened.verify()


def test_same_clips_give_same_bytes(tmp_path: Path) -> None:
    first = write_fake_shards(tmp_path / "a", clips=4, flame=True, text_dim=5, shard_bytes=40_000)
    second = write_fake_shards(tmp_path / "b", clips=4, flame=True, text_dim=5, shard_bytes=40_000)
    other = write_fake_shards(tmp_path / "c", clips=4, flame=True, text_dim=5, shard_bytes=40_000, seed=1)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    assert (first / "train-000000.tar").read_bytes() != (other / "train-000000.tar").read_bytes()


def test_shards_roll_over_and_keep_the_order(tmp_path: Path) -> None:
    whole = ShardSet.open(write_fake_shards(tmp_path / "one", clips=5))
    parts = ShardSet.open(write_fake_shards(tmp_path / "many", clips=5, shard_bytes=1))
    assert whole.manifest["splits"]["train"]["shards"] == ["train-000000.tar"]
    assert parts.manifest["splits"]["train"]["shards"] == [f"train-{i:06d}.tar" for i in range(5)]
    assert parts.split("train").keys == whole.split("train").keys
    assert parts.manifest["statistics"] == whole.manifest["statistics"]
    for index in range(5):
        assert_same_clip(parts.split("train").read(index), whole.split("train").read(index))


def test_plain_tarfile_reads(tmp_path: Path) -> None:
    root = write_fake_shards(tmp_path, clips=3, text_dim=4)
    clip = ShardSet.open(root).split("train").read(1)
    with tarfile.open(root / "train-000000.tar") as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == [
            f"train-{i:04d}.{kind}" for i in range(3) for kind in ("json", "safetensors")
        ]
        assert all(m.isreg() and m.mtime == 0 for m in members)
        payload, record = (tar.extractfile(f"{clip.key}.{kind}") for kind in ("safetensors", "json"))
        assert payload is not None and record is not None
        tensors, document = load(payload.read()), json.load(record)
    assert all(torch.equal(tensors[name], value) for name, value in clip.tensors().items())
    assert document["meta"] == clip.meta
    assert document["extractors"]["video"] == "dct-4x8x8-16-v1"


def test_plain_webdataset_reads(tmp_path: Path) -> None:
    root = write_fake_shards(tmp_path, clips=3)
    reader = ShardSet.open(root).split("train")
    samples = list(webdataset.WebDataset(str(root / "train-000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == reader.keys
    for index, sample in enumerate(samples):
        tensors = load(sample["safetensors"])
        assert all(torch.equal(tensors[name], value) for name, value in reader.read(index).tensors().items())
        assert json.loads(sample["json"])["key"] == sample["__key__"]


def test_statistics_are_those_of_the_train_split(tmp_path: Path) -> None:
    opened = ShardSet.open(write_fake_shards(tmp_path, clips=5, frames=4))
    clips = [opened.split("train").read(i) for i in range(5)]
    statistics = opened.manifest["statistics"]
    video = torch.stack([clip.video for clip in clips]).double()  # [N,F,C,H,W]
    for row, frames in ((0, video[:, :1]), (1, video[:, 1:])):
        mean, std = frames.mean((0, 1, 3, 4)), frames.std((0, 1, 3, 4), correction=0)
        torch.testing.assert_close(torch.tensor(statistics["video"]["mean"][row], dtype=torch.float64), mean)
        torch.testing.assert_close(torch.tensor(statistics["video"]["std"][row], dtype=torch.float64), std)
    for name, repeated in (("struct", 3), ("audio", 6)):
        track = torch.cat([getattr(clip, name).flatten(0, 1)[repeated:] for clip in clips]).double()
        torch.testing.assert_close(torch.tensor(statistics[name]["mean"], dtype=torch.float64), track.mean(0))
        torch.testing.assert_close(
            torch.tensor(statistics[name]["std"], dtype=torch.float64), track.std(0, correction=0)
        )


def test_statistics_survive_a_large_mean(tmp_path: Path) -> None:
    extractors = fake_extractors()
    with ShardSetWriter(tmp_path, extractors) as writer:
        for number in range(3):
            clip = fake_sample(f"k{number}", "id", extractors, frames=3, seed=number)
            clip.struct[:, :, 0] += 10_000.0  # squares of 1e8: a sum of squares in fp32 would lose the deviation of 2
            clip.struct[:, :, 1] = 0.25
            writer.add("train", clip)
        statistics = writer.finish([], {})["statistics"]
    assert statistics["struct"]["std"][0] == pytest.approx(2.0, rel=0.3)
    assert statistics["struct"]["std"][1] == 0.0
