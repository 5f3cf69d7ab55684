"""Sample frames for TensorBoard: what the video codec makes of latents."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dualforce.codecs import video_dct
from dualforce.codecs.protocols import VideoCodec
from dualforce.codecs.registry import video_codec
from dualforce.config import ConfigError
from dualforce.data.statistics import StreamStatistics

logger = logging.getLogger(__name__)


def sample_codec(tag: str, folder: str | None, device: torch.device) -> Callable[[], VideoCodec] | None:
    """What makes the codec when it is needed, so that between samples it takes no memory of the training; None, with a
    line in the log, where the tag names a pretrained one and no folder is given (`data.video_codec`).

    Raises ConfigError for a folder that does not exist, CodecError where another codec or none is in it.
    """
    if folder is None and tag != video_dct.TAG:
        logger.info("no sample frames: data.video_codec does not name the folder of the video codec %r", tag)
        return None
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"data.video_codec = {folder}: no such folder")
    path = None if folder is None else Path(folder)
    video_codec(tag, path)  # what is wrong with it is said before the first step
    return partial(video_codec, tag, path, device)


def sample_picture(codec: VideoCodec, statistics: StreamStatistics, latents: Mapping[str, Tensor]) -> Tensor:
    """uint8 [H,W,3] of latents [F,C,h,w], not denormalised: a row for each, the middle pixel frame and the last."""
    rows = []
    for clip in latents.values():
        pixels = torch.as_tensor(codec.decode(statistics.denormalise_video(clip.cpu())))
        rows.append(torch.cat((pixels[len(pixels) // 2], pixels[-1]), dim=1))
    return torch.cat(rows, dim=0)
