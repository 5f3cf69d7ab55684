"""RMSNorm and rotation against complex arithmetic in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.kernels.qk_norm_rope.reference import rms_norm, rotate, split_heads

EPS = 1e-6


def one_part(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, **how: Any) -> Tensor:
    """One projection alone."""
    return split_heads(x, [weight], cos, sin, parts=1, **how)[0]


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
    out = one_part(x, weight, angle.cos(), angle.sin(), heads=4, eps=EPS, interleaved=True)
    torch.testing.assert_close(out, turned(normed.unflatten(-1, (4, 16)), angle, True), rtol=0, atol=1e-12)


def test_types() -> None:
    x, angle = inputs(16, 5, 5)
    narrow = x.flatten(-2).bfloat16()
    weight = torch.rand(64).bfloat16() + 0.5
    cos, sin = angle.cos().float(), angle.sin().float()
    out = one_part(narrow, weight, cos, sin, heads=4, eps=EPS, interleaved=True)
    assert out.dtype == torch.bfloat16
    wanted = one_part(narrow.double(), weight.double(), cos, sin, heads=4, eps=EPS, interleaved=True)
    # Two roundings to bf16 (after the norm and after the rotation) of values up to 4.
    torch.testing.assert_close(out.double(), wanted, rtol=2**-7, atol=2**-6)


def test_gradients() -> None:
    x, angle = inputs(4, 2, 2)
    x, weight = x.flatten(-2).requires_grad_(), torch.rand(16, dtype=torch.float64, requires_grad=True)
    for interleaved in (True, False):
        assert torch.autograd.gradcheck(
            lambda x, w, i=interleaved: one_part(x, w, angle.cos(), angle.sin(), heads=4, eps=EPS, interleaved=i),
            (x, weight),
        )


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("angle_tokens", [5, 1, 0])
@pytest.mark.parametrize(("parts", "normed"), [(1, 1), (2, 1), (2, 2), (3, 2), (3, 1)])
def test_split_heads(parts: int, normed: int, angle_tokens: int, interleaved: bool) -> None:
    draws = [inputs(16, 5, angle_tokens or 1) for _ in range(parts)]
    angle = draws[0][1].expand(3, 5, -1)
    pieces = [x.flatten(-2) * (1 + i) - i for i, (x, _) in enumerate(draws)]
    weights = [torch.rand(64, dtype=torch.float64) + 0.5 for _ in range(normed)]
    cos, sin = (None, None) if angle_tokens == 0 else (draws[0][1].cos(), draws[0][1].sin())
    x = torch.cat(pieces, dim=-1)
    out = split_heads(x, weights, cos, sin, parts=parts, heads=4, eps=EPS, interleaved=interleaved)
    assert len(out) == parts
    for piece, weight, got in zip(pieces, weights, out, strict=False):
        wanted = (piece / (piece.pow(2).sum(-1, keepdim=True) / 64 + EPS).sqrt() * weight).unflatten(-1, (4, 16))
        wanted = turned(wanted, angle, interleaved) if angle_tokens else wanted
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    for i in range(normed, parts):
        assert torch.equal(out[i], pieces[i].unflatten(-1, (4, 16)))
        assert out[i].data_ptr() == x[..., 64 * i :].data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_split_heads_rounds_once(dtype: torch.dtype) -> None:
    x, angle = inputs(16, 5, 5)
    x, weight = x.flatten(-2).to(dtype), torch.rand(64) + 0.5
    cos, sin = angle.cos().float(), angle.sin().float()
    (out,) = split_heads(x, [weight], cos, sin, parts=1, heads=4, eps=EPS, interleaved=True)
    (wide,) = split_heads(x.float(), [weight], cos, sin, parts=1, heads=4, eps=EPS, interleaved=True)
    assert out.dtype == dtype and torch.equal(out, wide.to(dtype))


def test_split_heads_gradients() -> None:
    x, angle = inputs(4, 2, 1)
    x = torch.cat((x.flatten(-2), x.flatten(-2) + 1, x.flatten(-2) - 1), dim=-1).requires_grad_()
    weights = [torch.rand(16, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    for interleaved in (True, False):
        assert torch.autograd.gradcheck(
            lambda x, *w, i=interleaved: split_heads(
                x, w, angle.cos(), angle.sin(), parts=3, heads=4, eps=EPS, interleaved=i
            ),
            (x, *weights),
        )
