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
from dualforce.reused import empty, empty_like
from dualforce.types import ClipBatch, Conditioning, FrameSigma, Noised, Velocity, chunk_of


class Draw(NamedTuple):
    """The random part of a batch, on the CPU."""

    sigma: FrameSigma  # [B,F] each
    noise: Velocity  # the noise of both streams, [B,F,C,H,W] and [B,F,Q,Cs]
    keep: Tensor  # [B,3] bool: audio, reference, text


_ClipDraw = tuple[Tensor, Tensor, Tensor]  # levels [F] of video and of structure, and what is kept, [3] bool


def generator(*key: object) -> torch.Generator:
    """A CPU generator keyed by the values of `key`."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "big") >> 1)


def draw(batch: ClipBatch, config: NoiseConfig, seed: int, frames_per_chunk: int) -> Draw:
    """Levels, noise and condition dropout of the clips of an unpadded batch."""
    noise, clips = _room_for_noise(batch), []
    for position, *into in zip(batch.position, *noise, strict=True):
        source = generator("train", seed, *position)
        clips.append(_draw_clip(source, batch.video.shape[1], config, frames_per_chunk))
        _draw_noise(source, *into)
    return _stack(clips, noise)


def draw_fixed(batch: ClipBatch, levels: Sequence[float], seed: int) -> Draw:
    """Validation: clip b at `levels[b]` in every frame of both towers but frame 0, which is clean; nothing dropped."""
    noise, clips = _room_for_noise(batch), []
    for (_, position), level, *into in zip(batch.position, levels, *noise, strict=True):
        sigma = torch.full((batch.video.shape[1],), float(level))
        sigma[0] = 0.0
        clips.append((sigma, sigma, torch.ones(3, dtype=torch.bool)))
        _draw_noise(generator("validation", seed, position), *into)
    return _stack(clips, noise)


def mix(batch: ClipBatch, drawn: Draw) -> tuple[Noised, Velocity, Conditioning]:
    """(model input, velocity target, conditions): x = (1 - sigma) x0 + sigma e, target e - x0."""
    clean = Velocity(batch.video, batch.struct)
    target = Velocity(*(torch.sub(e, x, out=empty_like(x)) for e, x in zip(drawn.noise, clean, strict=True)))
    video, struct = (
        torch.mul(_like(s, x), v, out=empty_like(x)).add_(x) for x, s, v in zip(clean, drawn.sigma, target, strict=True)
    )
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


def _draw_clip(source: torch.Generator, frames: int, config: NoiseConfig, frames_per_chunk: int) -> _ClipDraw:
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
    return sigma_video * noisy, sigma_struct * noisy, keep


def _room_for_noise(batch: ClipBatch) -> Velocity:
    return Velocity(empty(batch.video.shape), empty(batch.struct.shape))


def _draw_noise(source: torch.Generator, video: Tensor, struct: Tensor) -> None:
    """Fill the noise of a clip, [F,C,H,W] and [F,Q,Cs]."""
    torch.randn(video.shape, generator=source, out=video)
    torch.randn(struct.shape, generator=source, out=struct)
    # The four slots of frame 0 hold one pixel frame: four draws would let the tower average the noise away.
    struct[0] = struct[0, :1].clone()


def _stack(clips: Sequence[_ClipDraw], noise: Velocity) -> Draw:
    video, struct, keep = (torch.stack(part) for part in zip(*clips, strict=True))
    return Draw(FrameSigma(video, struct), noise, keep)


def _like(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.reshape(*sigma.shape, *[1] * (x.dim() - 2))
