"""Stages 5 to 8: what the model learns from in one window. Each result carries the tag of its extractor.

Legend: P = 81 pixel frames, F = 21 latent frames, H,W pixels, C,h,w latent channels and size, Cs and Ca widths of
structure and audio.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualforce.codecs.disk_rows import DiskRows
from dualforce.codecs.face_box import Pixels
from dualforce.codecs.motion_landmarker import NoFaceError
from dualforce.codecs.motion_sidecar import Motion
from dualforce.codecs.protocols import AudioEncoder, FlameEncoder, MotionEncoder, Samples, VideoCodec
from dualforce.preprocess.reasons import Reason, Rejected
from dualforce.preprocess.windows import Window
from dualforce.types import FPS, SAMPLES_PER_FRAME, FrameSpan, audio_frames_of, latent_frames, struct_pixels

VOICED_SHARE = 0.1  # 20 dB below the loud parts of the video
VOICED_LEAST = 1e-3  # -60 dB of full scale
BLOCK = 2**11  # pixel frames whose loudness is taken together: 82 s


class Extracted(NamedTuple):
    """A stream and the tag of the extractor it comes from."""

    tag: str
    data: Tensor


def video_latents(codec: VideoCodec, pixels: Pixels) -> Extracted:
    """Latents [F,C,h,w] float16 of the window's crops [P,H,W,3] uint8."""
    return Extracted(codec.tag, _finite(codec.encode(pixels), codec.tag).half())


def reference_latent(codec: VideoCodec, pixels: Pixels) -> Extracted:
    """Latent [C,h,w] float16 of the window's first crop, coded alone: the reference image."""
    return Extracted(codec.tag, _finite(codec.encode_image(pixels[0]), codec.tag).half())


def picture_motion(encoder: MotionEncoder, pixels: Pixels) -> Extracted:
    """Structure [F,4,Cs] fp32 of the window's crops. Raises Rejected (R_NOFACE): a missing face is never filled in."""
    try:
        rows = encoder.encode(pixels, FPS)
    except NoFaceError as error:
        raise Rejected(Reason.R_NOFACE, f"{error} of the window") from error
    return Extracted(encoder.tag, _struct(_finite(rows, encoder.tag)))


def check_faces_seen(boxes: NDArray[np.float64]) -> None:
    """Raise Rejected (R_NOFACE) where a box [P,4] of the window is NaN: an encoder that takes any picture for a face
    would give motion that is none."""
    missing = np.flatnonzero(~np.isfinite(boxes).all(axis=1))
    if len(missing):
        raise Rejected(Reason.R_NOFACE, f"{NoFaceError(int(missing[0]))} of the window ({len(missing)} such)")


class ExtractedFlame(NamedTuple):
    """FLAME [F,4,Cf] fp32, `valid` [F,4] bool where it is data, and the tag of its extractor."""

    tag: str
    data: Tensor
    valid: Tensor


def flame_parameters(encoder: FlameEncoder, pixels: Pixels, boxes: NDArray[np.float64]) -> ExtractedFlame:
    """FLAME of the window's crops [P,H,W,3] uint8. `boxes` [P,4]: the face in their pixels, NaN where there is none."""
    found = encoder.encode(pixels, boxes)
    return ExtractedFlame(encoder.tag, _struct(found.values), _struct(found.valid))


def sidecar_motion(motion: Motion, window: Window) -> Extracted:
    """Structure [F,4,Cs] fp32 of the window from the motion that a rendered clip carries."""
    rows = motion.values[window.start : window.start + window.length]
    return Extracted(motion.tag, _struct(_finite(rows, motion.tag)))


class AudioTrack(NamedTuple):
    """Features [N,Ca] float16 at 50 Hz of a video's whole sound, on the disk, and the tag of their extractor."""

    tag: str
    rows: DiskRows


@contextmanager
def audio_track(encoder: AudioEncoder, wave: Samples, folder: Path) -> Iterator[AudioTrack]:
    """Features of a whole sound: windows cut from them have their true surroundings. They are kept in an unnamed file
    in `folder`. Raises Rejected (E_NONFINITE), and OSError when the disk is full."""
    with closing(DiskRows(folder, np.dtype(np.float16), (encoder.width,))) as rows:
        for part in encoder.stream(wave):
            rows.append(_finite(part, encoder.tag).half().numpy())
        yield AudioTrack(encoder.tag, rows)


def audio_window(track: AudioTrack, window: Window) -> Extracted:
    """Audio [F,8,Ca] float16 of the window, on the latent-frame clock."""
    rows = torch.from_numpy(track.rows[2 * window.start : 2 * (window.start + window.length)])
    span = FrameSpan(0, latent_frames(window.length))
    return Extracted(track.tag, rows[audio_frames_of(span)])


class Loudness(NamedTuple):
    """Mean square `power` [P] float64 of the sound of every pixel frame of a video, and the RMS `least` from which a
    frame counts as heard."""

    power: NDArray[np.float64]
    least: float


def loudness(wave: Samples) -> Loudness:
    """Of a video's whole sound. A frame is heard from a tenth (-20 dB) of the loud parts on, the 95th percentile of the
    RMS per pixel frame, and at least -60 dB of full scale. Sound shorter than a pixel frame has none."""
    stop, step = len(wave) // SAMPLES_PER_FRAME * SAMPLES_PER_FRAME, BLOCK * SAMPLES_PER_FRAME
    blocks = (wave[first : min(first + step, stop)] for first in range(0, stop, step))
    parts = [np.square(block, dtype=np.float64).reshape(-1, SAMPLES_PER_FRAME).mean(axis=1) for block in blocks]
    if not parts:
        return Loudness(np.zeros(0), VOICED_LEAST)
    power = np.concatenate(parts)
    return Loudness(power, max(VOICED_LEAST, VOICED_SHARE * float(np.percentile(np.sqrt(power), 95))))


def voiced_frames(sound: Loudness, window: Window) -> Tensor:
    """[F] bool: something is heard in the latent frame.

    The sound of latent frame j >= 1 is that of pixel frames 4j-3 .. 4j, of frame 0 that of pixel frame 0. This is
    loudness, not speech recognition: music counts too.
    """
    mine = torch.from_numpy(sound.power[window.start : window.start + window.length])
    level = mine[struct_pixels(FrameSpan(0, latent_frames(window.length)))].mean(dim=1).sqrt()
    return level >= sound.least


def _struct(rows: Tensor) -> Tensor:
    """Rows [P,Cs] of pixel frames -> [F,4,Cs] on the latent-frame clock."""
    return rows[struct_pixels(FrameSpan(0, latent_frames(len(rows))))].contiguous()


def _finite(values: Tensor, tag: str) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise Rejected(Reason.E_NONFINITE, f"{tag} gave NaN or infinity: expected finite values")
    return values
