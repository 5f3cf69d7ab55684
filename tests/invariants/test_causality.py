"""No output of a chunk depends on anything of a later chunk, by a single bit, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.plans import everything
from helpers.tiny_model import random_inputs, tiny_config, tiny_model
from torch import Tensor

from dualforce.config import ModelConfig
from dualforce.data.windows import audio_windows
from dualforce.model.dual_tower import DualTower
from dualforce.model.path import ChunkRule, FullPath
from dualforce.presets import PRESETS
from dualforce.types import Conditioning, FrameSpan, Noised, Velocity, chunk_of
from megatron_ext.kernels.attention.plan import FramePlan
from megatron_ext.kernels.kernel_set import select_kernels

KERNELS = select_kernels("reference", torch.device("cpu"), torch.float32)
FRAMES = 7
STRATEGIES = ("shallow_focus", "distributed", "progressive", "custom", "full", 2, [1])
DIRECTIONS = ("both", "s2v", "v2s", "none")


class LeakyRule(ChunkRule):
    """A mask that was dropped."""

    def plan(self, queries: Sequence[int], keys: Sequence[int]) -> FramePlan:
        return everything(len(queries), len(keys))


def preset_shape(name: str) -> ModelConfig:
    """The depths, head counts and bridge of a preset, at the least width that its heads allow."""
    row = PRESETS[name]
    (_, heads_v, _, layers_v), (_, heads_s, _, layers_s) = row.video, row.struct
    video = {"dim": 4 * heads_v, "heads": heads_v, "layers": layers_v}
    struct = {"dim": 4 * heads_s, "heads": heads_s, "layers": layers_s}
    audio = {
        "layers": row.audio[0],
        "heads": 4 if row.audio[1] is None else 3,
        "inner": None if row.audio[1] is None else 12,
    }
    return tiny_config(
        video=video, struct=struct, bridge={"layers": row.bridge}, audio=audio, frames_per_chunk=row.frames_per_chunk
    )


def run(model: DualTower, noised: Noised, cond: Conditioning, rule: ChunkRule | None = None) -> Velocity:
    span = FrameSpan(0, noised.video.shape[1])
    return model(noised, cond, span, FullPath(rule or model.rule, KERNELS, span))


def perturbed(noised: Noised, cond: Conditioning, frame: int) -> list[tuple[str, Noised, Conditioning]]:
    """The inputs with everything of one kind changed from `frame` on."""

    def change(x: Tensor) -> Tensor:
        return torch.cat((x[:, :frame], 0.9 - 0.5 * x[:, frame:]), dim=1)

    sigma = noised.sigma
    return [
        ("video", noised._replace(video=change(noised.video)), cond),
        ("struct", noised._replace(struct=change(noised.struct)), cond),
        ("sigma of video", noised._replace(sigma=sigma._replace(video=change(sigma.video))), cond),
        ("sigma of struct", noised._replace(sigma=sigma._replace(struct=change(sigma.struct))), cond),
        ("audio", noised, cond._replace(audio=change(cond.audio))),
    ]


def check_causal(config: ModelConfig, chunks: tuple[int, ...] = (1, 2)) -> None:
    model = tiny_model(config)
    noised, cond = random_inputs(config, frames=FRAMES)
    with torch.no_grad():
        before = run(model, noised, cond)
        for chunk in chunks:
            first = next(f for f in range(FRAMES) if chunk_of(f, config.frames_per_chunk) == chunk)
            for name, changed, conditions in perturbed(noised, cond, first):
                after = run(model, changed, conditions)
                for stream, old, new in zip(Velocity._fields, before, after, strict=True):
                    assert torch.equal(old[:, :first], new[:, :first]), (
                        f"{name} of chunk {chunk} reaches earlier {stream}"
                    )
                changes = any(
                    not torch.equal(old[:, first:], new[:, first:]) for old, new in zip(before, after, strict=True)
                )
                assert changes, f"{name} changes nothing at all"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_shape(preset: str) -> None:
    check_causal(preset_shape(preset), chunks=(2,))


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=str)
def test_every_bridge(strategy: Any, directions: str) -> None:
    layers = {"video": {"layers": 4}, "struct": {"layers": 4}}
    check_causal(tiny_config(bridge={"layers": strategy, "directions": directions}, **layers))


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("window", [None, 1, 2])
def test_chunks_and_windows(chunk: int, window: int | None) -> None:
    check_causal(tiny_config(frames_per_chunk=chunk, window=window, sink=1, bridge={"layers": "full"}))


def test_bridge_carries_information_both_ways() -> None:
    """Within a chunk each stream does reach the other; one-way bridges reach only the named one."""
    for directions, to_video, to_struct in (("both", True, True), ("s2v", True, False), ("v2s", False, True)):
        config = tiny_config(bridge={"layers": "full", "directions": directions})
        model = tiny_model(config)
        noised, cond = random_inputs(config, frames=FRAMES)
        with torch.no_grad():
            before = run(model, noised, cond)
            other_struct = run(model, noised._replace(struct=noised.struct + 1), cond)
            other_video = run(model, noised._replace(video=noised.video + 1), cond)
        assert torch.equal(before.video, other_struct.video) is not to_video
        assert torch.equal(before.struct, other_video.struct) is not to_struct


def test_dropped_mask_is_caught() -> None:
    config = tiny_config(bridge={"layers": "full"})
    model = tiny_model(config)
    noised, cond = random_inputs(config, frames=FRAMES)
    leaky = LeakyRule(config.frames_per_chunk, None, 0)
    with torch.no_grad():
        before = run(model, noised, cond, leaky)
        after = run(
            model, noised._replace(video=torch.cat((noised.video[:, :3], -noised.video[:, 3:]), 1)), cond, leaky
        )
    assert not torch.equal(before.video[:, :3], after.video[:, :3])
    assert not torch.equal(before.struct[:, :3], after.struct[:, :3])


def test_audio_reaches_exactly_the_declared_look_ahead() -> None:
    """Changing the 50 Hz track past a chunk's look-ahead changes nothing in the chunk; one frame earlier it does."""
    config = tiny_config(bridge={"layers": "full"})
    model, context = tiny_model(config), config.audio.context
    noised, cond = random_inputs(config, frames=FRAMES)
    track = torch.randn(FRAMES, 8, config.audio.dim, generator=torch.Generator().manual_seed(5))
    last_frame = 2  # the last of chunk 1
    beyond = 8 * last_frame + 1 + context + 1  # first 50 Hz frame past the window of latent frame 2

    def outputs(changed_from: int | None) -> Velocity:
        flat = torch.cat((track[0, 6:], track[1:].flatten(0, 1))).clone()
        if changed_from is not None:
            flat[changed_from:] *= -1  # a sum would vanish in the norm over the features
        stored = torch.cat((flat[:1].expand(6, -1), flat)).unflatten(0, (FRAMES, 8))
        windows = audio_windows(stored, FRAMES, context)[None]
        with torch.no_grad():
            return run(model, noised, cond._replace(audio=windows))

    before, same, other = outputs(None), outputs(beyond), outputs(beyond - 1)
    stop = last_frame + 1
    assert torch.equal(before.video[:, :stop], same.video[:, :stop])
    assert torch.equal(before.struct[:, :stop], same.struct[:, :stop])
    assert not torch.equal(before.video[:, :stop], other.video[:, :stop])


def test_gradients_of_later_inputs_are_exactly_zero() -> None:
    config = tiny_config(bridge={"layers": "full"}, window=2, sink=1)
    model = tiny_model(config)
    noised, cond = random_inputs(config, frames=FRAMES)
    leaves = {
        "video": noised.video, "struct": noised.struct, "audio": cond.audio,
        "sigma of video": noised.sigma.video, "sigma of struct": noised.sigma.struct,
    }  # fmt: skip
    for leaf in leaves.values():
        leaf.requires_grad_()
    out = run(model, noised, cond)
    stop = 3  # chunks 0 and 1
    weight = torch.randn(out.video[:, :stop].shape), torch.randn(out.struct[:, :stop].shape)
    ((out.video[:, :stop] * weight[0]).sum() + (out.struct[:, :stop] * weight[1]).sum()).backward()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert torch.count_nonzero(leaf.grad[:, stop:]) == 0, f"later {name} has a gradient"
        assert torch.count_nonzero(leaf.grad[:, :stop]) > 0, f"{name} has no gradient at all"
