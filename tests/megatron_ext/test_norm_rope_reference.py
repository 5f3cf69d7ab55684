"""RMSNorm and rotation against complex arithmetic in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_ext.kernels.qk_norm_rope.reference import norm_rope, rms_norm, rotate

EPS = 1e-6


def turned(x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """Pairs of x [B,F,T,N,K] as complex numbers times e^(i angle), angle [F,T,K/2]."""
    half = x.shape[-1] // 2
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
    out = torch.empty(x.shape, dtype=torch.float64)
    for i, (first, second) in enumerate(pairs):
        number = torch.complex(x[..., first].double(), x[..., second].double())
        number = number * torch.polar(torch.ones_like(angle[..., i]), angle[..., i])[None, :, :, None]
        out[..., first], out[..., second] = number.real, number.imag
    return out


def inputs(head: int, tokens: int, angle_tokens: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(head)
    x = torch.randn(2, 3, tokens, 4, head, generator=source, dtype=torch.float64)
    return x, torch.rand(3, angle_tokens, head // 2, generator=source, dtype=torch.float64) * 100


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("head", [2, 16, 32, 64, 128])
@pytest.mark.parametrize("angle_tokens", [5, 1])
def test_rotation(head: int, interleaved: bool, angle_tokens: int) -> None:
    x, angle = inputs(head, 5, angle_tokens)
    out = rotate(x, angle.cos(), angle.sin(), interleaved)
    torch.testing.assert_close(out, turned(x, angle.expand(3, 5, -1), interleaved), rtol=0, atol=1e-12)
    if head > 2:
        other = rotate(x, angle.cos(), angle.sin(), not interleaved)
        assert (out - other).abs().max() > 0.1
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))


def test_norm_is_over_the_full_width_and_comes_first() -> None:
    x, angle = inputs(16, 5, 5)
    x = x.flatten(-2)
    weight = torch.rand(64, dtype=torch.float64) + 0.5
    normed = x / (x.pow(2).sum(-1, keepdim=True) / 64 + EPS).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, EPS), normed, rtol=0, atol=1e-12)
    out = norm_rope(x, weight, angle.cos(), angle.sin(), heads=4, eps=EPS, interleaved=True)
    torch.testing.assert_close(out, turned(normed.unflatten(-1, (4, 16)), angle, True), rtol=0, atol=1e-12)


def test_types() -> None:
    x, angle = inputs(16, 5, 5)
    narrow = x.flatten(-2).bfloat16()
    weight = torch.rand(64).bfloat16() + 0.5
    cos, sin = angle.cos().float(), angle.sin().float()
    out = norm_rope(narrow, weight, cos, sin, heads=4, eps=EPS, interleaved=True)
    assert out.dtype == torch.bfloat16
    wanted = norm_rope(narrow.double(), weight.double(), cos, sin, heads=4, eps=EPS, interleaved=True)
    # Two roundings to bf16 (after the norm and after the rotation) of values up to 4.
    torch.testing.assert_close(out.double(), wanted, rtol=2**-7, atol=2**-6)


def test_gradients() -> None:
    x, angle = inputs(4, 2, 2)
    x, weight = x.flatten(-2).requires_grad_(), torch.rand(16, dtype=torch.float64, requires_grad=True)
    for interleaved in (True, False):
        assert torch.autograd.gradcheck(
            lambda x, w, i=interleaved: norm_rope(x, w, angle.cos(), angle.sin(), heads=4, eps=EPS, interleaved=i),
            (x, weight),
        )
