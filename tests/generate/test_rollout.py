"""The rollout against a plain sampler without a cache, and what its noise, guidance and given motion promise."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers.random_model import random_model, reference_kernels
from torch import Tensor

from dualforce.config import ModelOverrides
from dualforce.diffusion.schedule import joint_levels
from dualforce.generate.pyramid import scheduling_matrix
from dualforce.generate.rollout import FinishedChunk, RolloutInputs, RolloutSettings, chunk_noise, rollout
from dualforce.model.dual_tower import DualTower
from dualforce.model.path import VIDEO, ChunkRule, FullPath, Path, Site
from dualforce.types import AUDIO_FRAMES, STRUCT_TOKENS, Conditioning, FrameSigma, FrameSpan, Noised, Velocity

C, H, W, CS, CA, TEXT = 16, 4, 4, 6, 5, 64
BASE = RolloutSettings(steps=3, seed=7, shift_video=3.0, shift_struct=0.5)
PYRAMID = replace(BASE, lag=1, horizon=99)


@pytest.fixture(scope="module")
def model() -> DualTower:
    return random_model(CS, CA)


def make_inputs(frames: int, *, text: bool = True, struct: bool = False) -> RolloutInputs:
    """Random conditions; those of a longer clip begin with those of a shorter one."""
    source = torch.Generator().manual_seed(1)
    reference, motion = torch.randn(C, H, W, generator=source), torch.randn(1, CS, generator=source)
    words = torch.randn(3, TEXT, generator=source)
    audio = torch.randn(32, AUDIO_FRAMES + 4, CA, generator=source)[:frames]
    given = torch.randn(32, STRUCT_TOKENS, CS, generator=source)[:frames]
    return RolloutInputs(
        reference, motion.expand(STRUCT_TOKENS, CS), audio, words if text else None, given if struct else None
    )


def run(model: DualTower, inputs: RolloutInputs, settings: RolloutSettings = BASE) -> list[FinishedChunk]:
    return list(rollout(model, reference_kernels(), inputs, settings))


def joined(chunks: list[FinishedChunk]) -> tuple[Tensor, Tensor]:
    return torch.cat([chunk.video for chunk in chunks]), torch.cat([chunk.struct for chunk in chunks])


class PlainSampler:
    """Every frame in one frame-causal forward without a cache, levels from the scheduling matrix, and one forward per
    guidance branch."""

    def __init__(self, model: DualTower, inputs: RolloutInputs, settings: RolloutSettings) -> None:
        self.model, self.inputs, self.settings = model, inputs, settings
        self.rule = ChunkRule(model.config.frames_per_chunk, settings.window, settings.sink)

    def velocity(self, video: Tensor, struct: Tensor, sigma: FrameSigma, text: bool, audio: bool) -> Velocity:
        span = FrameSpan(0, len(video))
        words = torch.zeros(1, TEXT) if self.inputs.text is None else self.inputs.text
        cond = Conditioning(
            self.inputs.audio[None, : len(video)], torch.tensor([audio]),
            self.inputs.reference[None], torch.tensor([True]), words[None], torch.tensor([text]),
        )  # fmt: skip
        noised = Noised(video[None], struct[None], FrameSigma(sigma.video[None], sigma.struct[None]))
        out = self.model(noised, cond, span, FullPath(self.rule, reference_kernels(), span))
        return Velocity(out.video[0], out.struct[0])

    def guided(self, video: Tensor, struct: Tensor, sigma: FrameSigma) -> Velocity:
        plain, read, heard = (
            self.velocity(video, struct, sigma, *keep) for keep in [(False, False), (True, False), (True, True)]
        )
        scales = self.settings.text_scale, self.settings.audio_scale
        return Velocity(
            *(a + scales[0] * (b - a) + scales[1] * (c - b) for a, b, c in zip(plain, read, heard, strict=True))
        )

    def run(self) -> tuple[Tensor, Tensor]:
        frames, size, steps = len(self.inputs.audio), self.model.config.frames_per_chunk, self.settings.steps
        chunks = (frames - 1) // size
        noise = [
            chunk_noise(self.settings.seed, i + 1, (size, C, H, W), (size, STRUCT_TOKENS, CS)) for i in range(chunks)
        ]
        video = torch.cat([self.inputs.reference[None], *(pair[0] for pair in noise)])
        struct = torch.cat([self.inputs.first_motion[None], *(pair[1] for pair in noise)])
        levels = joint_levels(steps, self.settings.shift_video, self.settings.shift_struct)
        matrix = scheduling_matrix(steps, chunks, min(self.settings.lag, steps))
        for before, after in pairwise(matrix):
            now, then = (
                torch.tensor([steps, *(steps - level for level in row for _ in range(size))]) for row in (before, after)
            )
            sigma = FrameSigma(*(level[now].float() for level in levels))
            change = [(level[then] - level[now]).float() for level in levels]
            v = self.guided(video, struct, sigma)
            video = video + v.video * change[0][:, None, None, None]
            struct = struct + v.struct * change[1][:, None, None]
        return video, struct


@pytest.mark.parametrize(
    "settings",
    [
        BASE,
        replace(BASE, text_scale=2.0, audio_scale=3.0),
        replace(BASE, audio_scale=2.0),
        replace(BASE, window=2, sink=1),
        PYRAMID,
        replace(PYRAMID, window=2, audio_scale=2.0),
    ],
    ids=["ar", "three-branches", "two-branches", "window", "pyramid", "pyramid-window"],
)
def test_cached_rollout_equals_plain_sampler(model: DualTower, settings: RolloutSettings) -> None:
    inputs = make_inputs(9)
    video, struct = joined(run(model, inputs, settings))
    expected_video, expected_struct = PlainSampler(model, inputs, settings).run()
    # Rounding only: a few Euler steps on values of order 1 to 10, guidance amplifies it.
    torch.testing.assert_close(video, expected_video, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(struct, expected_struct, rtol=1e-4, atol=1e-4)


class Oracle:
    """Stands for a perfectly trained model: knows the clean clip and answers noise - clean, as training defines it."""

    def __init__(self, model: DualTower, video: Tensor, struct: Tensor) -> None:
        self.config, self.parameters, self.video, self.struct = model.config, model.parameters, video, struct

    def __call__(self, noised: Noised, cond: Conditioning, span: FrameSpan, path: Path) -> Velocity:
        key = torch.zeros(1, span.length, 1, 1, 2)
        path(Site(VIDEO, 0), key, key, key)
        answers = []
        for x, clean, sigma in zip(noised[:2], (self.video, self.struct), noised.sigma, strict=True):
            level = sigma.view(*sigma.shape, *[1] * (x.dim() - 2))
            # x = (1 - s) clean + s noise, hence noise - clean = (x - clean) / s; at s = 0 the answer is never used.
            answers.append(torch.where(level > 0, (x - clean[span.start : span.stop]) / level.clamp_min(1e-9), 7.0))
        return Velocity(*answers)


@pytest.mark.parametrize("settings", [BASE, replace(PYRAMID, horizon=2)], ids=["ar", "pyramid"])
def test_a_perfect_model_gives_the_clean_clip(model: DualTower, settings: RolloutSettings) -> None:
    source = torch.Generator().manual_seed(2)
    video, struct = torch.randn(7, C, H, W, generator=source), torch.randn(7, STRUCT_TOKENS, CS, generator=source)
    inputs = replace(make_inputs(7), reference=video[0], first_motion=struct[0])
    found = joined(run(Oracle(model, video, struct), inputs, settings))  # type: ignore[arg-type]
    torch.testing.assert_close(found, (video, struct), rtol=0, atol=1e-5)


def test_window_and_mode_matter(model: DualTower) -> None:
    inputs = make_inputs(9)
    video = joined(run(model, inputs))[0]
    for other in (replace(BASE, window=1), PYRAMID, replace(BASE, audio_scale=2.0), replace(BASE, seed=8)):
        changed = joined(run(model, inputs, other))[0]
        assert torch.equal(changed[0], video[0]) and (changed[-1] - video[-1]).abs().max() > 1e-3, other


def test_chunks_come_in_order_and_frame_zero_is_the_reference(model: DualTower) -> None:
    inputs = make_inputs(7)
    chunks = run(model, inputs)
    assert [chunk.span for chunk in chunks] == [FrameSpan(0, 1), FrameSpan(1, 2), FrameSpan(3, 2), FrameSpan(5, 2)]
    assert torch.equal(chunks[0].video[0], inputs.reference) and torch.equal(chunks[0].struct[0], inputs.first_motion)


@pytest.mark.parametrize("settings", [BASE, replace(PYRAMID, horizon=3)], ids=["ar", "pyramid"])
def test_beginning_does_not_depend_on_length(model: DualTower, settings: RolloutSettings) -> None:
    short, long = run(model, make_inputs(5), settings), run(model, make_inputs(11), settings)
    for a, b in zip(short, long, strict=False):
        # In pyramid mode a longer clip stacks more frames into one product, which changes the order of its sums.
        torch.testing.assert_close(a.video, b.video, rtol=0, atol=0 if settings is BASE else 1e-4)
        torch.testing.assert_close(a.struct, b.struct, rtol=0, atol=0 if settings is BASE else 1e-4)


def test_noise_depends_on_seed_and_chunk_only() -> None:
    shape: tuple[Any, Any] = ((2, C, H, W), (2, STRUCT_TOKENS, CS))
    first, again = chunk_noise(0, 1, *shape), chunk_noise(0, 1, *shape)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (chunk_noise(0, 2, *shape), chunk_noise(1, 1, *shape)):
        assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


def test_guidance_of_one_is_the_conditional_model(model: DualTower) -> None:
    inputs = make_inputs(5)
    settings = replace(BASE, text_scale=1.0, audio_scale=1.0)
    sampler = PlainSampler(model, inputs, settings)
    sampler.guided = lambda *args: sampler.velocity(*args, text=True, audio=True)  # type: ignore[method-assign]
    torch.testing.assert_close(joined(run(model, inputs, settings)), sampler.run(), rtol=1e-4, atol=1e-4)


def test_lag_of_all_steps_equals_autoregressive(model: DualTower) -> None:
    inputs = make_inputs(7)
    expected = joined(run(model, inputs, BASE))
    for lag in (BASE.steps, BASE.steps + 4):
        found = joined(run(model, inputs, replace(PYRAMID, lag=lag)))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("settings", [BASE, PYRAMID], ids=["ar", "pyramid"])
def test_given_motion_is_kept_and_heard(model: DualTower, settings: RolloutSettings) -> None:
    inputs = make_inputs(7, struct=True)
    assert inputs.struct is not None
    video, struct = joined(run(model, inputs, settings))
    assert torch.equal(struct[0], inputs.first_motion) and torch.equal(struct[1:], inputs.struct[1:])
    other = inputs.struct.clone()
    other[-2:] += 1.0
    changed = joined(run(model, replace(inputs, struct=other), settings))[0]
    assert torch.allclose(changed[:-2], video[:-2], atol=1e-5)
    assert (changed[-2:] - video[-2:]).abs().max() > 1e-3


def test_cache_is_bounded_by_the_window(model: DualTower, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    from dualforce.model.kv_cache import KVCache

    commit = KVCache.commit

    def watched(self: KVCache, span: FrameSpan) -> None:
        commit(self, span)
        held.append(len(self.frames))

    monkeypatch.setattr(KVCache, "commit", watched)
    run(model, make_inputs(21), replace(BASE, steps=1, window=3, sink=1))
    assert max(held) == held[-1] == 1 + 2 * 2  # the sink and the two earlier chunks of the window


def test_text_free_model_and_sizes() -> None:
    model = random_model(CS, CA, ModelOverrides(text=False, frames_per_chunk=3))
    video, _ = joined(run(model, make_inputs(7, text=False)))
    assert video.shape == (7, C, H, W) and torch.isfinite(video).all()
    with pytest.raises(ValueError, match=r"8 latent frames: expected 1 \+ k \* frames_per_chunk \(3\)"):
        run(model, make_inputs(8, text=False))
    with pytest.raises(ValueError, match="given motion has 4 latent frames: expected 7"):
        run(model, replace(make_inputs(7, text=False), struct=torch.zeros(4, STRUCT_TOKENS, CS)))
