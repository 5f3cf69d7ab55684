"""FLAME alignment (model reference 8.3)."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_model import randomise
from torch import Tensor

from dualforce.losses.flame import FlameHead

B, F, Q, CS, CF = 2, 4, 4, 6, 7


def inputs() -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(0)
    sigma = torch.rand(B, F, generator=source)
    sigma[:, 0] = 0.0  # a clean frame
    return {
        "clean": torch.randn(B, F, Q, CS, generator=source),
        "denoised": torch.randn(B, F, Q, CS, generator=source),
        "flame": torch.randn(B, F, Q, CF, generator=source),
        "sigma": sigma,
        "valid": torch.rand(B, F, Q, generator=source) < 0.6,
    }


def head() -> FlameHead:
    return randomise(FlameHead(CS, CF))


def test_against_a_loop() -> None:
    flame, given = head().requires_grad_(False), inputs()
    sums = flame(**given)
    matrix, offset = flame.weight.double(), flame.bias.double()
    aligned = fitted = 0.0
    for b in range(B):
        for f in range(F):
            for q in range(Q):
                if not given["valid"][b, f, q]:
                    continue
                level, wanted = given["sigma"][b, f].double(), given["flame"][b, f, q].double()
                guess = (matrix @ given["denoised"][b, f, q].double() + offset - wanted).pow(2).mean()
                aligned += float((1 - level) ** 2 * guess) if level > 0 else 0.0
                fitted += float((matrix @ given["clean"][b, f, q].double() + offset - wanted).pow(2).mean())
    assert (sums.aligned.item(), sums.fitted.item()) == pytest.approx((aligned, fitted), rel=1e-5)


def test_the_projection_learns_from_clean_motion_only() -> None:
    """Else it would learn to forgive the errors of the denoised motion."""
    for name, reached in (("aligned", (False, False, True)), ("fitted", (True, True, False))):
        flame, given = head(), inputs()
        ends = (flame.weight, flame.bias, given["denoised"].requires_grad_())
        gradients = torch.autograd.grad(getattr(flame(**given), name), ends, allow_unused=True)
        assert tuple(grad is not None and bool(grad.any()) for grad in gradients) == reached


def test_clean_and_invalid_slots_take_no_part() -> None:
    flame, given = head(), inputs()
    before = flame(**given)
    noise = given["denoised"].clone()
    noise[:, 0] += 100.0  # sigma is 0 there
    noise[~given["valid"]] += 100.0
    assert torch.equal(flame(**{**given, "denoised": noise}).aligned, before.aligned)
    missing = given["flame"].clone()
    missing[~given["valid"]] += 100.0
    for one, other in zip(flame(**{**given, "flame": missing}), before, strict=True):
        torch.testing.assert_close(one, other)
    moved = given["denoised"].clone()
    moved[given["valid"]] += 1.0
    assert not torch.equal(flame(**{**given, "denoised": moved}).aligned, before.aligned)


def test_nothing_valid_is_zero() -> None:
    given = {**inputs(), "valid": torch.zeros(B, F, Q, dtype=torch.bool)}
    assert [term.item() for term in head()(**given)] == [0, 0]


def test_narrow_weights_are_used_in_fp32() -> None:
    narrow = head().bfloat16()
    wide = FlameHead(CS, CF)
    wide.load_state_dict({name: value.float() for name, value in narrow.state_dict().items()})
    for one, other in zip(narrow(**inputs()), wide(**inputs()), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)
