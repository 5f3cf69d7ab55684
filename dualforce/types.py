"""The values that pass between the parts of the trainer.

Legend: B batch, F latent frames, C,H,W latent channels, height and width, P video tokens per frame, Q structure tokens
per frame (4), A audio frames per latent frame (8), c audio context frames, E text tokens.

What crosses an ``nn.Module`` boundary is a NamedTuple of tensors, because the hooks of ZeRO-3 look into tuples only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PIXEL_FRAMES_PER_LATENT = 4
STRUCT_TOKENS = 4  # Q: one per pixel frame of a latent frame
AUDIO_FRAMES = 8  # A: 50 Hz frames per latent frame at 6.25 latent frames a second
FPS = 25
AUDIO_HZ = 50
SAMPLE_RATE = 16_000
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS  # sound of one pixel frame


class ClipBatch(NamedTuple):
    """Training clips on the latent-frame clock, normalised, in fp32 unless said."""

    video: Tensor  # [B,F,C,H,W]
    struct: Tensor  # [B,F,Q,Cs]
    audio: Tensor  # [B,F,A+2c,Ca] windows with their context
    flame: Tensor  # [B,F,Q,Cf]; of no meaning where flame_valid is False
    flame_valid: Tensor  # [B,F,Q] bool
    voiced: Tensor  # [B,F] bool: speech is heard in the frame
    reference: Tensor  # [B,C,H,W] latent of the reference image
    text: Tensor  # [B,E,Ct]; zeros are the null prompt
    valid: Tensor  # [B,F] bool: False on frames padded at the end
    keys: tuple[str, ...]
    position: tuple[tuple[int, int], ...]  # (epoch, position in the epoch) of each clip: keys its noise


class FrameSigma(NamedTuple):
    """Noise levels in [0, 1], fp32: 0 is clean, 1 is noise."""

    video: Tensor  # [B,F]
    struct: Tensor  # [B,F]


class Noised(NamedTuple):
    """Model input: latents mixed with noise at the given levels."""

    video: Tensor  # [B,F,C,H,W]
    struct: Tensor  # [B,F,Q,Cs]
    sigma: FrameSigma


class Velocity(NamedTuple):
    """Noise minus clean data (prediction and target share the type)."""

    video: Tensor  # [B,F,C,H,W]
    struct: Tensor  # [B,F,Q,Cs]


class Conditioning(NamedTuple):
    """What drives the clip. A `keep` of False replaces the condition by its null value."""

    audio: Tensor  # [B,F,A+2c,Ca]
    audio_keep: Tensor  # [B] bool
    reference: Tensor  # [B,C,H,W]
    reference_keep: Tensor  # [B] bool
    text: Tensor  # [B,E,Ct]
    text_keep: Tensor  # [B] bool


class LossTerms(NamedTuple):
    """Scalars in fp32; `flame` and `lip_sync` are None where the run has no such loss."""

    video: Tensor
    struct: Tensor
    flame: Tensor | None
    lip_sync: Tensor | None
    total: Tensor


@dataclass(frozen=True)
class FrameSpan:
    """Which latent frames a tensor holds: `length` frames from absolute frame `start`."""

    start: int
    length: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.length < 1:
            raise ValueError(f"FrameSpan({self.start}, {self.length}): expected start >= 0 and length >= 1")

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def frames(self) -> range:
        return range(self.start, self.stop)


def chunk_of(frame: int, frames_per_chunk: int) -> int:
    """Index of the chunk that latent frame `frame` belongs to; chunks are [1, n, n, ...]."""
    return 0 if frame == 0 else 1 + (frame - 1) // frames_per_chunk


def latent_frames(pixel_frames: int) -> int:
    """F of a clip of `pixel_frames` = 1 + 4 (F - 1) pixel frames; raises ValueError for another count."""
    if pixel_frames < 1 or pixel_frames % PIXEL_FRAMES_PER_LATENT != 1:
        raise ValueError(f"{pixel_frames} pixel frames: expected 1 + 4 k")
    return 1 + (pixel_frames - 1) // PIXEL_FRAMES_PER_LATENT


def pixel_frames(latents: int) -> int:
    """Pixel frames of a clip of `latents` latent frames."""
    return 1 + PIXEL_FRAMES_PER_LATENT * (latents - 1)


def latent_of_pixel(pixel: int) -> int:
    """Latent frame that holds pixel frame `pixel`: ceil(p / 4)."""
    return math.ceil(pixel / PIXEL_FRAMES_PER_LATENT)


def struct_pixels(span: FrameSpan) -> Tensor:
    """Pixel frame of every structure slot, [F,Q] int64: max(0, 4j - 3 + q)."""
    frame = torch.arange(span.start, span.stop, dtype=torch.int64, device="cpu")[:, None]
    slot = torch.arange(STRUCT_TOKENS, dtype=torch.int64, device="cpu")[None, :]
    return (PIXEL_FRAMES_PER_LATENT * frame - 3 + slot).clamp_min(0)


def audio_frames_of(span: FrameSpan, context: int = 0) -> Tensor:
    """50 Hz frame of every audio slot with `context` on each side, [F,A+2c] int64: 8j - 6 + a, at least 0 without
    context (frame 0 repeats); with context the left end is clamped the same way."""
    frame = torch.arange(span.start, span.stop, dtype=torch.int64, device="cpu")[:, None]
    slot = torch.arange(-context, AUDIO_FRAMES + context, dtype=torch.int64, device="cpu")[None, :]
    return (AUDIO_FRAMES * frame - 6 + slot).clamp_min(0)
