"""Sample frames in TensorBoard are decoded where that can be done, and left out with a word where not."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from helpers.model_folder import run_config
from helpers.random_model import random_model
from helpers.wan_vae import write_wan_vae

from dualforce.codecs import video_dct
from dualforce.codecs.protocols import CodecError
from dualforce.codecs.video_wan import WanVideoCodec
from dualforce.config import ConfigError
from dualforce.data.statistics import StreamStatistics
from dualforce.train.sample_frames import sample_codec, sample_picture

CPU = torch.device("cpu")


def test_dct_needs_no_folder() -> None:
    make = sample_codec(video_dct.TAG, None, CPU)
    assert make is not None and make().tag == video_dct.TAG


def test_a_pretrained_codec_comes_from_its_folder(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    folder, other = write_wan_vae(tmp_path / "vae"), write_wan_vae(tmp_path / "other", seed=1)
    tag = WanVideoCodec(folder).tag
    make = sample_codec(tag, str(folder), CPU)
    assert make is not None and make().tag == tag
    with pytest.raises(CodecError, match=f"other: is .*: expected '{tag}'"):
        sample_codec(tag, str(other), CPU)
    with pytest.raises(ConfigError, match=r"data\.video_codec = .*gone: no such folder"):
        sample_codec(tag, str(tmp_path / "gone"), CPU)
    with pytest.raises(CodecError, match="not used"):
        sample_codec(video_dct.TAG, str(folder), CPU)


def test_without_folder_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert sample_codec("wan2.1-4x8x8-16-0123456789ab-v1", None, CPU) is None
    assert len(caplog.records) == 1 and "data.video_codec" in caplog.text and "0123456789ab" in caplog.text


def test_a_picture_shows_the_middle_and_the_last_of_each_clip() -> None:
    statistics = StreamStatistics.from_manifest(run_config(random_model()))
    codec = video_dct.DctVideoCodec()
    clips = {name: torch.randn(5, 16, 4, 6) for name in ("clean", "noised")}
    picture = sample_picture(codec, statistics, clips)
    assert picture.shape == (2 * 32, 2 * 48, 3) and picture.dtype == torch.uint8
    for row, clip in enumerate(clips.values()):
        pixels = torch.as_tensor(codec.decode(statistics.denormalise_video(clip)))
        wanted = torch.cat((pixels[8], pixels[16]), dim=1)
        assert torch.equal(picture[32 * row : 32 * (row + 1)], wanted)
