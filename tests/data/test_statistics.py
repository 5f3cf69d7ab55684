"""Normalisation: unit variance on the train split, exact inverse, one row for frame 0, and deviations with a floor."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers.fake_shards import write_fake_shards

from data_shards.reader import ShardSet
from data_shards.schema import ShardError
from dualforce.data.statistics import StreamStatistics, floored


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(write_fake_shards(tmp_path_factory.mktemp("shards"), clips=6, frames=5))


@pytest.fixture(scope="module")
def statistics(shards: ShardSet) -> StreamStatistics:
    return StreamStatistics.from_manifest(shards.manifest)


def test_train_split_has_unit_variance(shards: ShardSet, statistics: StreamStatistics) -> None:
    reader = shards.split("train")
    video = statistics.normalise_video(torch.stack([reader.read(i).video for i in range(len(reader))]))
    for frames in (video[:, :1], video[:, 1:]):
        torch.testing.assert_close(frames.mean((0, 1, 3, 4)), torch.zeros(16), atol=1e-5, rtol=0)
        torch.testing.assert_close(frames.std((0, 1, 3, 4), correction=0), torch.ones(16), atol=1e-5, rtol=0)


def test_frame_0_has_a_row_of_its_own_wherever_the_span_starts(shards: ShardSet, statistics: StreamStatistics) -> None:
    video = shards.split("train").read(0).video
    whole = statistics.normalise_video(video)
    assert torch.equal(statistics.normalise_video(video[:2]), whole[:2])
    assert torch.equal(statistics.normalise_video(video[2:], first_frame=2), whole[2:])
    assert not torch.equal(statistics.normalise_video(video[2:3]), whole[2:3])
    assert torch.equal(statistics.normalise_reference(video[0]), whole[0])
    torch.testing.assert_close(statistics.denormalise_video(whole), video.float())
    torch.testing.assert_close(statistics.denormalise_video(whole[3:], first_frame=3), video[3:].float())


def test_other_streams(shards: ShardSet, statistics: StreamStatistics) -> None:
    clip = shards.split("train").read(0)
    struct = statistics.normalise_struct(clip.struct)
    assert not torch.equal(struct, clip.struct)
    torch.testing.assert_close(statistics.denormalise_struct(struct), clip.struct)
    audio = statistics.normalise_audio(clip.audio)
    assert audio.dtype == torch.float32
    torch.testing.assert_close(audio * statistics.audio_std + statistics.audio_mean, clip.audio.float())


def test_json_round_trip_is_exact(statistics: StreamStatistics) -> None:
    section = json.loads(json.dumps(statistics.to_dict()))
    for form in (section, {"model": {}, "statistics": section}):
        again = StreamStatistics.from_manifest(form)
        assert again.to_dict() == statistics.to_dict()


def test_floor_catches_dead_channels_only() -> None:
    std = torch.tensor([0.0, 1e-5, 0.02, 0.05, 0.06, 8.0, 12.0])
    assert floored(std).tolist() == pytest.approx([1e-3, 1e-3, 0.02, 0.05, 0.06, 8.0, 12.0])
    large = torch.tensor([0.0, 1.0, 200.0, 300.0, 400.0])
    assert floored(large).tolist() == [2.0, 2.0, 200.0, 300.0, 400.0]
    for values in (std, large, torch.zeros(4)):
        assert torch.equal(floored(floored(values)), floored(values))


def test_a_constant_channel_does_not_blow_up(statistics: StreamStatistics) -> None:
    section = statistics.to_dict()
    section["struct"]["std"][0] = 0.0
    read = StreamStatistics.from_manifest(section)
    moved = torch.zeros(1, 4, 8)
    moved[..., 0] = read.struct_mean[0] + 0.01
    assert read.normalise_struct(moved)[..., 0].abs().max() <= 10.0


@pytest.mark.parametrize(
    ("stream", "kind", "value", "named"),
    [
        ("video", "std", [1.0] * 16, r"statistics.video.std: shape \[16\]: expected \[2,C\]"),
        ("struct", "mean", ["x"], "statistics.struct.mean"),
        ("struct", "mean", [1.0, *[float("nan")] * 7], r"statistics.struct.mean\[1\]: nan: expected finite"),
        ("struct", "std", [1.0] * 5 + [-2.0] * 3, r"statistics.struct.std\[5\]: -2.0: expected finite"),
        ("video", "std", [[1.0] * 16, [1e300] * 16], r"statistics.video.std\[1, 0\]: inf: expected finite"),
        ("audio", "std", [-1.0] * 12, r"statistics.audio.std\[0\]: .* at least 0"),
        ("audio", "std", [1.0] * 3, "statistics.audio: .* expected one shape"),
        ("audio", "mean", None, "statistics.audio.mean"),
    ],
)
def test_wrong_sections(statistics: StreamStatistics, stream: str, kind: str, value: Any, named: str) -> None:
    section = statistics.to_dict()
    section[stream][kind] = value
    with pytest.raises(ShardError, match=named) as caught:
        StreamStatistics.from_manifest(section, "model/config.json")
    assert str(caught.value).startswith("model/config.json: ")


@pytest.mark.parametrize(
    ("stream", "values", "named"),
    [
        ("video", [[0.5] * 8] * 2, "statistics.video: 8 channels: expected 16"),
        ("struct", [0.5], "statistics.struct: 1 channels: expected 8"),
        ("audio", [0.5] * 13, "statistics.audio: 13 channels: expected 12"),
        ("flame", [0.5], "statistics.flame: 1 channels: expected 56"),
    ],
)
def test_statistics_of_another_width_than_the_clips(
    with_flame: ShardSet, stream: str, values: list[Any], named: str
) -> None:
    """One of width 1 would go with any clip, and train another model."""
    manifest = {**with_flame.manifest, "statistics": dict(with_flame.manifest["statistics"])}
    StreamStatistics.from_manifest(manifest).check_widths(manifest["extractors"])
    manifest["statistics"][stream] = {"mean": values, "std": values}
    with pytest.raises(ShardError, match=f"^here: {named}, as extractors has it$"):
        StreamStatistics.from_manifest(manifest).check_widths(manifest["extractors"], "here")


def test_wrong_video_shape(statistics: StreamStatistics) -> None:
    with pytest.raises(ValueError, match=r"expected \[..,F,16,H,W\]"):
        statistics.normalise_video(torch.zeros(16, 5, 4, 4))
    with pytest.raises(ValueError, match="from frame -1"):
        statistics.normalise_video(torch.zeros(5, 16, 4, 4), first_frame=-1)


@pytest.fixture(scope="module")
def with_flame(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(write_fake_shards(tmp_path_factory.mktemp("flame"), clips=6, frames=5, flame=True))


def test_valid_flame_of_the_train_split_has_unit_variance(with_flame: ShardSet) -> None:
    statistics, reader = StreamStatistics.from_manifest(with_flame.manifest), with_flame.split("train")
    rows = []
    for clip in map(reader.read, range(len(reader))):
        assert clip.flame is not None and clip.flame_valid is not None
        rows.append(statistics.normalise_flame(clip.flame).flatten(0, 1)[3:][clip.flame_valid.flatten()[3:]])
    values = torch.cat(rows)
    torch.testing.assert_close(values.mean(0), torch.zeros(56), atol=1e-4, rtol=0)
    torch.testing.assert_close(values.std(0, correction=0), torch.ones(56), atol=1e-4, rtol=0)
    assert values.dtype == torch.float32


def test_flame_has_the_floor_of_other_streams(with_flame: ShardSet) -> None:
    section = StreamStatistics.from_manifest(with_flame.manifest).to_dict()
    assert section.keys() == {"video", "struct", "audio", "flame"}
    section["flame"]["std"][2] = 0.0
    read = StreamStatistics.from_manifest(section)
    assert read.flame_std is not None and float(read.flame_std[2]) == pytest.approx(1e-3, abs=1e-4)
    assert read.to_dict()["flame"]["mean"] == section["flame"]["mean"]


def test_flame_without_statistics_is_read_but_not_trained_on(with_flame: ShardSet) -> None:
    manifest = {**with_flame.manifest, "statistics": dict(with_flame.manifest["statistics"])}
    del manifest["statistics"]["flame"]
    statistics = StreamStatistics.from_manifest(manifest)
    assert statistics.flame_mean is None and "flame" not in statistics.to_dict()
    with pytest.raises(ShardError, match=r"^here: statistics.flame: absent: .*dualforce data upgrade OLD NEW\)$"):
        statistics.check_widths(manifest["extractors"], "here")
    without = {stream: entry for stream, entry in manifest["extractors"].items() if stream != "flame"}
    statistics.check_widths(without, "here")


@pytest.mark.parametrize("entry", [3, {"mean": [0.0]}, {"mean": [0.0], "std": [-1.0]}, {"mean": [0.0], "std": [1, 2]}])
def test_wrong_statistics_of_flame_are_named(statistics: StreamStatistics, entry: Any) -> None:
    with pytest.raises(ShardError, match=r"x.json: statistics.flame"):
        StreamStatistics.from_manifest({**statistics.to_dict(), "flame": entry}, "x.json")
