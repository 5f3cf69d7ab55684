"""Decoding chunks as they come."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.model_folder import run_config
from helpers.random_model import random_model
from helpers.wan_vae import write_wan_vae

from dualforce.codecs.protocols import VideoCodec
from dualforce.codecs.registry import video_codec_in
from dualforce.data.statistics import StreamStatistics
from dualforce.generate.rollout import FinishedChunk
from dualforce.generate.video import pictures
from dualforce.types import FrameSpan


@pytest.fixture(params=["dct", "wan"])
def codec(request: pytest.FixtureRequest, tmp_path: Path) -> VideoCodec:
    """Frames that are independent, and frames whose pictures depend on all earlier ones."""
    if request.param == "wan":
        pytest.importorskip("diffusers")
        return video_codec_in(write_wan_vae(tmp_path))
    return video_codec_in(None)


def test_pictures_are_those_of_the_whole_clip_and_no_chunk_too_many_is_made(codec: VideoCodec) -> None:
    statistics = StreamStatistics.from_manifest(run_config(random_model()))
    latents = torch.randn(7, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    made: list[int] = []

    def chunks() -> Iterator[FinishedChunk]:
        for span in (FrameSpan(0, 1), FrameSpan(1, 2), FrameSpan(3, 2), FrameSpan(5, 2)):
            made.append(span.start)
            yield FinishedChunk(span, latents[span.start : span.stop], torch.empty(0))

    found = np.stack(list(pictures(chunks(), statistics, codec, 12)))
    expected = codec.decode(statistics.denormalise_video(latents))
    assert np.array_equal(found, expected[:12])
    assert made == [
        0,
        1,
        3,
    ]  # 1 + 8 pixel frames, then the chunk of pixel frames 9 .. 16; the last one is not asked for
