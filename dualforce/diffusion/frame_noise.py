"""Diffusion Forcing (Chen et al. 2024, arXiv 2407.01392): every latent frame of each tower has its own noise level.

Legend: B batch, F frames, C,H,W latent channels, height, width, Q structure tokens.

Everything random about a clip is drawn on the CPU from a generator keyed by (seed, epoch, position of the clip in the
epoch), on its real frames before padding: independent of ranks, accumulation, sequence-parallel size and device, hence
the same after a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dualforce.config import NoiseConfig
from dualforce.diffusion.schedule import shift
from dualforce.types import ClipBatch, Conditioning, FrameSigma, Noised, Velocity, chunk_of


class Draw(NamedTuple):
    """The random part of a batch, on the CPU."""

    sigma: FrameSigma  # [B,F] each
    noise: Velocity  # the noise of both streams, [B,F,C,H,W] and [B,F,Q,Cs]
    keep: Tensor  # [B,3] bool: audio, reference, text


def generator(*key: object) -> torch.Generator:
    """A CPU generator keyed by the values of `key`."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)


def draw(batch: ClipBatch, config: NoiseConfig, seed: int, frames_per_chunk: int) -> Draw:
    """Levels, noise and condition dropout of the clips of an unpadded batch."""
    clips = [
        _draw_clip(generator("train", seed, *position), batch, config, frames_per_chunk) for position in batch.position
    ]
    return _stack(clips)


def draw_fixed(batch: ClipBatch, levels: Sequence[float], seed: int) -> Draw:
    """Validation: clip b at `levels[b]` in every frame of both towers but frame 0, which is clean; nothing dropped."""
    clips = []
    for (_, position), level in zip(batch.position, levels, strict=True):
        sigma = torch.full((batch.video.shape[1],), float(level))
        sigma[0] = 0.0
        noise = _noise(generator("validation", seed, position), batch)
        clips.append(Draw(FrameSigma(sigma, sigma), noise, torch.ones(3, dtype=torch.bool)))
    return _stack(clips)


def mix(batch: ClipBatch, drawn: Draw) -> tuple[Noised, Velocity, Conditioning]:
    """(model input, velocity target, conditions): x = (1 - sigma) x0 + sigma e, target e - x0."""
    clean = Velocity(batch.video, batch.struct)
    target = Velocity(*(e - x for e, x in zip(drawn.noise, clean, strict=True)))
    video, struct = (x + _like(s, x) * v for x, s, v in zip(clean, drawn.sigma, target, strict=True))
    keep_audio, keep_reference, keep_text = drawn.keep.unbind(1)
    cond = Conditioning(batch.audio, keep_audio, batch.reference, keep_reference, batch.text, keep_text)
    return Noised(video, struct, drawn.sigma), target, cond


def pad_draw(drawn: Draw, frames: int) -> Draw:
    """Append clean, noiseless frames up to `frames`; padded frames carry finite values and no loss."""
    extra = frames - drawn.sigma.video.shape[1]
    sigma, noise = (
        kind(*(torch.cat((x, x.new_zeros(x.shape[0], extra, *x.shape[2:])), dim=1) for x in value))
        for kind, value in ((FrameSigma, drawn.sigma), (Velocity, drawn.noise))
    )
    return Draw(sigma, noise, drawn.keep)  # type: ignore[arg-type]


def _draw_clip(source: torch.Generator, batch: ClipBatch, config: NoiseConfig, frames_per_chunk: int) -> Draw:
    frames = batch.video.shape[1]
    # Every number is drawn whether it is used or not, so that one option does not move the others.
    first, prefix, prefix_length, same_video, same_struct = torch.rand(5, generator=source).tolist()
    keep = torch.rand(3, generator=source) >= config.p_drop
    u_video, u_struct, u_above = torch.rand(3, frames, generator=source).unbind(0)
    sigma_video = shift(u_video, config.shift_video)
    low, high = config.max_sigma_struct * u_struct, 1 - (1 - config.max_sigma_struct) * u_struct
    sigma_struct = shift(torch.where(u_above < config.p_above_max_struct, high, low), config.shift_struct)
    if same_video < config.p_same:
        sigma_video = sigma_video[:1].expand(frames)
    if same_struct < config.p_same:
        sigma_struct = sigma_struct[:1].expand(frames)
    chunks = chunk_of(frames - 1, frames_per_chunk) + 1
    clean = 1 if first < config.p_clean_first and frames > 1 else 0
    if prefix < config.p_clean_prefix and chunks > 1:
        clean_chunks = 1 + int(prefix_length * (chunks - 1))  # 1 .. chunks - 1: something is left to learn
        clean = 1 + (clean_chunks - 1) * frames_per_chunk
    noisy = (torch.arange(frames) >= clean).float()
    return Draw(FrameSigma(sigma_video * noisy, sigma_struct * noisy), _noise(source, batch), keep)


def _noise(source: torch.Generator, batch: ClipBatch) -> Velocity:
    video = torch.randn(batch.video.shape[1:], generator=source)
    struct = torch.randn(batch.struct.shape[1:], generator=source)
    # The four slots of frame 0 hold one pixel frame: four draws would let the tower average the noise away.
    struct[0] = struct[0, :1]
    return Velocity(video, struct)


def _stack(clips: Sequence[Draw]) -> Draw:
    video, struct = (torch.stack([clip.sigma[i] for clip in clips]) for i in range(2))
    noise = Velocity(*(torch.stack([clip.noise[i] for clip in clips]) for i in range(2)))
    return Draw(FrameSigma(video, struct), noise, torch.stack([clip.keep for clip in clips]))


def _like(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.reshape(*sigma.shape, *[1] * (x.dim() - 2))
