"""The rollout: chunks of latent frames, denoised one after the other against a cache of the finished ones.

Frame 0 is given (the latent of the reference image and the motion seen in it) and enters the cache clean. Each further
chunk starts from its own noise, takes `steps` Euler steps on the joint schedule, in which structure leads video, and is
run once more at noise level 0 to enter the cache: only clean chunks are ever cached. A lag below `steps` keeps several
chunks in flight (see `pyramid`), otherwise one is finished before the next one starts.

Legend: R guidance rows, F latent frames, n frames of a chunk, C,H,W latent, Q structure tokens, A+2c audio frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dualforce.diffusion.frame_noise import generator
from dualforce.diffusion.schedule import joint_levels
from dualforce.generate.guidance import Branch, combine, guidance_branches
from dualforce.generate.pyramid import rows
from dualforce.model.dual_tower import DualTower
from dualforce.model.kv_cache import KVCache
from dualforce.model.path import CachedPath
from dualforce.types import Conditioning, FrameSigma, FrameSpan, Noised, Velocity
from megatron_ext.kernels.kernel_set import KernelSet


@dataclass(frozen=True)
class RolloutInputs:
    """What drives one clip, normalised, fp32, without a batch dimension; F = 1 + k n frames."""

    reference: Tensor  # [C,H,W] latent of the reference image: frame 0
    first_motion: Tensor  # [Q,Cs] motion of frame 0
    audio: Tensor  # [F,A+2c,Ca]
    text: Tensor | None = None  # [E,Ct]
    struct: Tensor | None = None  # [F,Q,Cs]: motion that is given, not sampled


@dataclass(frozen=True)
class RolloutSettings:
    """How to sample; `lag` >= `steps` is autoregressive, `horizon` bounds the chunks in flight."""

    steps: int
    seed: int
    shift_video: float
    shift_struct: float
    text_scale: float = 1.0
    audio_scale: float = 1.0
    lag: int = 1_000_000
    horizon: int = 1
    window: int | None = None
    sink: int = 0


class FinishedChunk(NamedTuple):
    """Clean latents of one chunk, normalised, fp32, on the model's device."""

    span: FrameSpan
    video: Tensor  # [n,C,H,W]
    struct: Tensor  # [n,Q,Cs]


def chunk_noise(seed: int, chunk: int, video: tuple[int, ...], struct: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Noise of one chunk, fp32 on the CPU: a function of (seed, chunk) alone, so that neither the length of the clip
    nor the device nor the mode changes it."""
    source = generator("rollout", seed, chunk)
    return torch.randn(video, generator=source), torch.randn(struct, generator=source)


def rollout(
    model: DualTower, kernels: KernelSet, inputs: RolloutInputs, settings: RolloutSettings
) -> Iterator[FinishedChunk]:
    """Yield the clip chunk by chunk, frame 0 first. With a window, memory does not grow with the length.

    Raises ValueError when the number of frames is not 1 + k * frames_per_chunk or a given struct has another length.
    """
    return _Sampler(model, kernels, inputs, settings).run()


@dataclass
class _Flight:
    """A chunk that is being denoised."""

    span: FrameSpan
    video: Tensor  # [n,C,H,W]
    struct: Tensor  # [n,Q,Cs]


class _Sampler:
    def __init__(self, model: DualTower, kernels: KernelSet, inputs: RolloutInputs, settings: RolloutSettings) -> None:
        config = model.config
        frames = inputs.audio.shape[0]
        if (frames - 1) % config.frames_per_chunk:
            raise ValueError(f"{frames} latent frames: expected 1 + k * frames_per_chunk ({config.frames_per_chunk})")
        if inputs.struct is not None and inputs.struct.shape[0] != frames:
            raise ValueError(f"given motion has {inputs.struct.shape[0]} latent frames: expected {frames}")
        self.model, self.kernels, self.inputs, self.settings = model, kernels, inputs, settings
        self.device = next(model.parameters()).device
        self.size = config.frames_per_chunk
        self.frames = frames
        self.branches = guidance_branches(settings.text_scale, settings.audio_scale, inputs.text is not None)
        self.levels = joint_levels(settings.steps, settings.shift_video, settings.shift_struct)
        self.cache = KVCache(config.frames_per_chunk, settings.window, settings.sink)
        self.cond = _conditioning(inputs, self.branches, config.video.text_dim, self.device)
        self._last_path: tuple[tuple[FrameSpan, tuple[int, ...]], CachedPath] | None = None

    @torch.inference_mode()
    def run(self) -> Iterator[FinishedChunk]:
        first = FrameSpan(0, 1)
        yield self._finish(
            _Flight(first, self._state(self.inputs.reference[None]), self._state(self.inputs.first_motion[None]))
        )
        chunks = (self.frames - 1) // self.size
        if not chunks:
            return
        flights: list[_Flight] = []
        for row in rows(self.settings.steps, chunks, self.settings.lag, self.settings.horizon):
            if row.done[-1] == 0:
                flights.append(self._start(row.first + len(row.done)))
            self._step(flights, row.done)
            if row.done[0] + 1 == self.settings.steps:
                yield self._finish(flights.pop(0))

    def _start(self, chunk: int) -> _Flight:
        span = FrameSpan(1 + (chunk - 1) * self.size, self.size)
        video, struct = chunk_noise(
            self.settings.seed,
            chunk,
            (self.size, *self.inputs.reference.shape),
            (self.size, *self.inputs.first_motion.shape),
        )
        if self.inputs.struct is not None:
            struct = self.inputs.struct[span.start : span.stop]
        return _Flight(span, self._state(video), self._state(struct))

    def _state(self, x: Tensor) -> Tensor:
        return x.to(self.device, torch.float32)

    def _step(self, flights: list[_Flight], done: tuple[int, ...]) -> None:
        """One Euler step of every chunk in flight, each at its own level."""
        sigma_video, sigma_struct = self.levels
        per_chunk = torch.tensor(done)
        span = FrameSpan(flights[0].span.start, self.size * len(flights))
        sigma = FrameSigma(
            sigma_video[per_chunk].repeat_interleave(self.size),
            sigma_struct[per_chunk].repeat_interleave(self.size) * (self.inputs.struct is None),
        )
        velocity = self._velocity(
            span,
            torch.cat([flight.video for flight in flights]),
            torch.cat([flight.struct for flight in flights]),
            sigma,
        )
        for index, (flight, count) in enumerate(zip(flights, done, strict=True)):
            part = slice(index * self.size, (index + 1) * self.size)
            flight.video = flight.video + velocity.video[part] * (sigma_video[count + 1] - sigma_video[count]).item()
            if self.inputs.struct is None:
                delta = (sigma_struct[count + 1] - sigma_struct[count]).item()
                flight.struct = flight.struct + velocity.struct[part] * delta

    def _finish(self, flight: _Flight) -> FinishedChunk:
        """The clean pass that writes a finished chunk into the cache."""
        zero = torch.zeros(flight.span.length)
        self._velocity(flight.span, flight.video, flight.struct, FrameSigma(zero, zero))
        self.cache.commit(flight.span)
        return FinishedChunk(flight.span, flight.video, flight.struct)

    def _velocity(self, span: FrameSpan, video: Tensor, struct: Tensor, sigma: FrameSigma) -> Velocity:
        """Guided velocity of the frames of `span`, [F,...] fp32; stages their keys and values."""
        count = len(self.branches)
        noised = Noised(
            video.expand(count, *video.shape),
            struct.expand(count, *struct.shape),
            FrameSigma(*(self._state(level).expand(count, -1) for level in sigma)),
        )
        audio = self.inputs.audio[span.start : span.stop].to(self.device)
        cond = self.cond._replace(audio=audio.expand(count, *audio.shape))
        velocity = self.model(noised, cond, span, self._path(span))
        guided = combine(self.branches, velocity)
        return Velocity(guided.video[0], guided.struct[0])

    def _path(self, span: FrameSpan) -> CachedPath:
        """One path for all passes over a span against the same committed frames: kernels prepare for each new one."""
        key = (span, tuple(self.cache.frames))
        if self._last_path is None or self._last_path[0] != key:
            self._last_path = (key, CachedPath(self.cache, self.kernels, span))
        return self._last_path[1]


def _conditioning(
    inputs: RolloutInputs, branches: tuple[Branch, ...], text_dim: int, device: torch.device
) -> Conditioning:
    """Conditions of all rows; `audio` is filled in for each span."""
    count = len(branches)
    text = torch.zeros(1, text_dim) if inputs.text is None else inputs.text
    text, reference = text.to(device), inputs.reference.to(device)
    return Conditioning(
        audio=torch.empty(0, device=device),
        audio_keep=torch.tensor([branch.audio for branch in branches], device=device),
        reference=reference.expand(count, *reference.shape),
        reference_keep=torch.ones(count, dtype=torch.bool, device=device),
        text=text.expand(count, *text.shape),
        text_keep=torch.tensor([branch.text for branch in branches], device=device),
    )
