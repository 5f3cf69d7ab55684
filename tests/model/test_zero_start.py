"""Zero start: a fresh model equals one without audio, bridge and dual-sigma residual, bit for bit.

The heads too start at zero, and then every output is zero and each comparison would pass for nothing: they alone are
filled with random values. Each comparison is then made again with the module in question random, and must fail.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.tiny_model import kernels, random_inputs, randomise, tiny_config
from torch import Tensor

from dualforce.model.dual_tower import DualTower
from dualforce.model.path import FullPath
from dualforce.types import Conditioning, FrameSpan, Noised, Velocity

CONFIG = tiny_config()
SPAN = FrameSpan(0, 5)
Change = Callable[[Noised, Conditioning], tuple[Noised, Conditioning]]


def fresh(seed: int = 0) -> DualTower:
    torch.manual_seed(seed)
    model = DualTower(CONFIG, kernels()).requires_grad_(False)
    randomise(model.ends.video.head, 1)
    randomise(model.ends.struct.head, 2)
    return model


def run(model: DualTower, noised: Noised, cond: Conditioning) -> Velocity:
    return model(noised, cond, SPAN, FullPath(model.rule, kernels(), SPAN))


def inputs() -> tuple[Noised, Conditioning]:
    return random_inputs(CONFIG, batch=2)


def no_audio(noised: Noised, cond: Conditioning) -> tuple[Noised, Conditioning]:
    return noised, cond._replace(audio_keep=torch.tensor([False, False]))


def other_audio(noised: Noised, cond: Conditioning) -> tuple[Noised, Conditioning]:
    return noised, cond._replace(audio=cond.audio + 1 + cond.audio.roll(1, 2))


def other_struct(noised: Noised, cond: Conditioning) -> tuple[Noised, Conditioning]:
    return noised._replace(struct=noised.struct.flip(0)), cond


def other_video(noised: Noised, cond: Conditioning) -> tuple[Noised, Conditioning]:
    return noised._replace(video=noised.video.flip(0)), cond


def other_level(stream: str) -> Change:
    def change(noised: Noised, cond: Conditioning) -> tuple[Noised, Conditioning]:
        sigma = noised.sigma._replace(**{stream: 1 - getattr(noised.sigma, stream)})
        return noised._replace(sigma=sigma), cond

    return change


def randomise_all(model: DualTower, name: str) -> None:
    """Draw the parameters of every module of that name."""
    found = [module for path, module in model.named_modules() if path.rpartition(".")[2] == name]
    assert found, name
    for module in found:
        randomise(module)


CASES = [
    # change of the input, output that must not move, modules that let it move once they are random
    pytest.param(no_audio, "video", ["audio_video"], id="no audio, video"),
    pytest.param(no_audio, "struct", ["audio_struct"], id="no audio, struct"),
    pytest.param(other_audio, "video", ["audio_video"], id="other audio, video"),
    pytest.param(other_audio, "struct", ["audio_struct"], id="other audio, struct"),
    pytest.param(other_struct, "video", ["bridge"], id="other struct"),
    pytest.param(other_video, "struct", ["bridge"], id="other video"),
    pytest.param(other_level("struct"), "video", ["dual_sigma_video"], id="other struct level"),
    pytest.param(other_level("video"), "struct", ["dual_sigma_struct"], id="other video level"),
]


@pytest.mark.parametrize(("change", "output", "modules"), CASES)
def test_what_starts_at_zero_has_no_influence(change: Change, output: str, modules: list[str]) -> None:
    model = fresh()
    before, after = run(model, *inputs()), run(model, *change(*inputs()))
    assert getattr(before, output).abs().max() > 0.1
    assert torch.equal(getattr(before, output), getattr(after, output))
    for name in modules:
        randomise_all(model, name)
    before, after = run(model, *inputs()), run(model, *change(*inputs()))
    assert not torch.equal(getattr(before, output), getattr(after, output))


def test_a_fresh_model_equals_one_without_audio_bridge_and_residual() -> None:
    whole = fresh()
    bare_config = tiny_config(audio={"layers": 0}, bridge={"directions": "none"})
    bare = DualTower(bare_config, kernels()).requires_grad_(False)
    absent = bare.load_state_dict({k: v for k, v in whole.state_dict().items() if k in bare.state_dict()}, strict=True)
    assert not absent.missing_keys
    bare.embedding.dual_sigma_video = bare.embedding.dual_sigma_struct = _NoResidual()
    for one, other in zip(run(whole, *inputs()), run(bare, *inputs()), strict=True):
        assert torch.equal(one, other) and one.abs().max() > 0.1
    for name in ("bridge", "audio_video", "dual_sigma_video"):
        changed = fresh()
        randomise_all(changed, name)
        assert not torch.equal(run(changed, *inputs()).video, run(bare, *inputs()).video), name


class _NoResidual(torch.nn.Module):
    def forward(self, own: Tensor, other: Tensor) -> Tensor:
        return torch.zeros(())


def test_an_untouched_model_predicts_zero() -> None:
    model = DualTower(CONFIG, kernels())
    assert not any(out.any() for out in run(model, *inputs()))
