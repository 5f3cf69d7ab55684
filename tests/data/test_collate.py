"""ClipBatch from clips: crop, normalisation, optional streams, and padding at the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.fake_shards import write_fake_shards

from data_shards.reader import ShardSet
from data_shards.schema import ClipSample, ShardError
from dualforce.data.collate import collate, pad_frames
from dualforce.data.order import ClipRef
from dualforce.data.statistics import StreamStatistics
from dualforce.data.windows import audio_windows
from dualforce.types import ClipBatch

REFS = [ClipRef(0, 0, 0), ClipRef(2, 1, 1)]


def clips_of(
    root: Path, *, flame: bool = False, text_dim: int | None = None
) -> tuple[list[ClipSample], StreamStatistics]:
    opened = ShardSet.open(
        write_fake_shards(root, clips=2, frames=7, height=3, width=5, flame=flame, text_dim=text_dim)
    )
    reader = opened.split("train")
    return [reader.read(0), reader.read(1)], StreamStatistics.from_manifest(opened.manifest)


def test_fields(tmp_path: Path) -> None:
    clips, statistics = clips_of(tmp_path, flame=True, text_dim=6)
    batch = collate(clips, REFS, statistics, frames=5, context=2, text_dim=6)
    assert batch.keys == ("train-0000", "train-0001")
    assert batch.position == ((0, 0), (2, 1))
    assert batch.valid.all() and batch.valid.shape == (2, 5)
    for row, clip in enumerate(clips):
        assert clip.flame is not None and clip.flame_valid is not None and clip.text is not None
        assert torch.equal(batch.video[row], statistics.normalise_video(clip.video)[:5])
        assert torch.equal(batch.struct[row], statistics.normalise_struct(clip.struct)[:5])
        assert torch.equal(batch.reference[row], statistics.normalise_reference(clip.reference))
        assert torch.equal(batch.audio[row], audio_windows(statistics.normalise_audio(clip.audio), 5, 2))
        assert torch.equal(batch.voiced[row], clip.voiced[:5])
        assert torch.equal(batch.flame[row], statistics.normalise_flame(clip.flame)[:5])
        assert not torch.equal(batch.flame[row], clip.flame[:5])
        assert torch.equal(batch.flame_valid[row], clip.flame_valid[:5])
        assert torch.equal(batch.text[row], clip.text.float())
    floats = [x for x in batch if isinstance(x, torch.Tensor) and x.is_floating_point()]
    assert len(floats) == 6 and all(x.dtype == torch.float32 for x in floats)


def test_flame_without_statistics_is_refused(tmp_path: Path) -> None:
    clips, statistics = clips_of(tmp_path, flame=True, text_dim=6)
    with pytest.raises(ShardError, match=r"statistics\.flame: absent: .*dualforce data upgrade OLD NEW"):
        collate(clips, REFS, replace(statistics, flame_mean=None, flame_std=None), frames=5, context=2, text_dim=6)


def test_absent_streams_are_switched_off(tmp_path: Path) -> None:
    clips, statistics = clips_of(tmp_path)
    batch = collate(clips, REFS, statistics, frames=7, context=0, text_dim=9)
    assert batch.flame.shape == (2, 7, 4, 56) and not batch.flame.any()
    assert batch.flame_valid.shape == (2, 7, 4) and not batch.flame_valid.any()
    assert batch.text.shape == (2, 1, 9) and not batch.text.any()


def test_clips_that_do_not_fit(tmp_path: Path) -> None:
    clips, statistics = clips_of(tmp_path, flame=True, text_dim=6)
    with pytest.raises(ShardError, match=r"'train-0000': video: 7 latent frames: expected at least data.frames = 9"):
        collate(clips, REFS, statistics, frames=9, context=2, text_dim=6)
    with pytest.raises(ShardError, match="text: width 6: expected text_dim = 8"):
        collate(clips, REFS, statistics, frames=5, context=2, text_dim=8)
    mixed = [clips[0], replace(clips[1], flame=None, flame_valid=None)]
    with pytest.raises(ShardError, match="flame: 1 of 2 samples"):
        collate(mixed, REFS, statistics, frames=5, context=2, text_dim=6)
    assert clips[1].text is not None
    shorter = [clips[0], replace(clips[1], text=clips[1].text[:2])]
    with pytest.raises(ShardError, match=r"token counts \[2, 3\]"):
        collate(shorter, REFS, statistics, frames=5, context=2, text_dim=6)
    with pytest.raises(ValueError, match="2 samples, 1 refs"):
        collate(clips, REFS[:1], statistics, frames=5, context=2, text_dim=6)


def same(a: ClipBatch, b: ClipBatch) -> bool:
    pairs = zip(a, b, strict=True)
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor) else x == y for x, y in pairs
    )


@pytest.mark.parametrize(("multiple", "total"), [(1, 5), (2, 6), (4, 8), (5, 5), (7, 7)])
def test_padding_is_at_the_end_and_switched_off(tmp_path: Path, multiple: int, total: int) -> None:
    clips, statistics = clips_of(tmp_path, flame=True, text_dim=6)
    batch = collate(clips, REFS, statistics, frames=5, context=2, text_dim=6)
    batch = batch._replace(voiced=torch.ones_like(batch.voiced), flame_valid=torch.ones_like(batch.flame_valid))
    padded = pad_frames(batch, multiple)
    per_frame = ("video", "struct", "audio", "flame", "flame_valid", "voiced", "valid")
    for name in per_frame:
        before, after = getattr(batch, name), getattr(padded, name)
        assert after.shape == (2, total, *before.shape[2:]), name
        assert after.dtype == before.dtype, name
        assert torch.equal(after[:, :5], before), name
        assert not after[:, 5:].any(), name
    assert same(padded._replace(**{name: getattr(batch, name) for name in per_frame}), batch)


def test_impossible_multiple(tmp_path: Path) -> None:
    clips, statistics = clips_of(tmp_path)
    with pytest.raises(ValueError, match="multiple 0"):
        pad_frames(collate(clips, REFS, statistics, frames=5, context=2, text_dim=6), 0)
