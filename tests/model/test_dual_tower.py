"""The whole forward: what reaches which output, conditions that are dropped, and precision."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_model import kernels, random_inputs, tiny_config, tiny_model

from dualforce.model.dual_tower import DualTower
from dualforce.model.path import FullPath
from dualforce.types import Conditioning, FrameSpan, Noised, Velocity


def run(model: DualTower, noised: Noised, cond: Conditioning, dtype: torch.dtype = torch.float32) -> Velocity:
    span = FrameSpan(0, noised.video.shape[1])
    return model(noised, cond, span, FullPath(model.rule, kernels(dtype), span))


@pytest.mark.parametrize(
    ("directions", "video_moves", "struct_moves"),
    [("both", True, True), ("s2v", True, False), ("v2s", False, True), ("none", False, False)],
)
def test_directions_of_the_bridge(directions: str, video_moves: bool, struct_moves: bool) -> None:
    config = tiny_config(bridge={"directions": directions})
    model = tiny_model(config).requires_grad_(False)
    noised, cond = random_inputs(config)
    out = run(model, noised, cond)
    by_struct = run(model, noised._replace(struct=noised.struct + 1), cond)
    by_video = run(model, noised._replace(video=noised.video + 1), cond)
    assert torch.equal(out.video, by_struct.video) is not video_moves
    assert torch.equal(out.struct, by_video.struct) is not struct_moves
    assert not torch.equal(out.struct, by_struct.struct) and not torch.equal(out.video, by_video.video)


def test_dropped_conditions_are_their_null_values() -> None:
    config = tiny_config()
    model = tiny_model(config).requires_grad_(False)
    noised, cond = random_inputs(config, batch=2)
    out = run(model, noised, cond)
    nothing = torch.tensor([False, False])
    for name, other in (("text", torch.zeros_like(cond.text)), ("reference", cond.reference + 1)):
        dropped = cond._replace(**{f"{name}_keep": nothing})
        with_other = dropped._replace(**{name: other})
        results = run(model, noised, dropped), run(model, noised, with_other)
        assert torch.equal(results[0].video, results[1].video)
        assert not torch.equal(results[0].video, out.video)
    no_text = run(model, noised, cond._replace(text=torch.zeros_like(cond.text)))
    assert torch.equal(no_text.video, run(model, noised, cond._replace(text_keep=nothing)).video)
    one = cond._replace(audio_keep=torch.tensor([True, False]))
    changed = (run(model, noised, one).video != out.video).flatten(1).any(1)
    assert changed.tolist() == [False, True]


@pytest.mark.parametrize("batch", [2, 3])
def test_clips_do_not_mix(batch: int) -> None:
    config = tiny_config()
    model = tiny_model(config, dtype=torch.float64).requires_grad_(False)
    noised, cond = random_inputs(config, batch=batch, dtype=torch.float64)
    together = run(model, noised, cond, torch.float64)
    for clip in range(batch):
        own = slice(clip, clip + 1)
        sigma = type(noised.sigma)(*(x[own] for x in noised.sigma))
        single = Noised(noised.video[own], noised.struct[own], sigma)
        alone = run(model, single, Conditioning(*(x[own] for x in cond)), torch.float64)
        for one, all_clips in zip(alone, together, strict=True):
            torch.testing.assert_close(one, all_clips[own], rtol=0, atol=1e-11)


def test_narrow_model_predicts_in_fp32() -> None:
    config = tiny_config()
    narrow, wide = tiny_model(config, dtype=torch.bfloat16), tiny_model(config)
    wide.load_state_dict({name: value.float() for name, value in narrow.state_dict().items()})
    noised, cond = random_inputs(config)
    out, exact = run(narrow, noised, cond, torch.bfloat16), run(wide, noised, cond)
    for one, other in zip(out, exact, strict=True):
        assert one.dtype == torch.float32
        # Three blocks, a bridge and audio, each rounding to 2^-9: a few percent of the outputs' size.
        assert (one - other).pow(2).mean().sqrt() < 0.05 * other.pow(2).mean().sqrt()
