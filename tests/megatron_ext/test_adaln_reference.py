"""Adaptive LayerNorm against float64 arithmetic written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_ext.kernels.adaln.reference import adaln, adaln_residual, gated_residual, layer_norm

SHAPE = (2, 3, 4, 16)  # B, F, T, D
EPS = 1e-6


def tensors(dtype: torch.dtype, count: int, rows: int) -> list[Tensor]:
    source = torch.Generator().manual_seed(0)
    wide = [torch.randn(SHAPE, generator=source, dtype=torch.float64) * 2 + 1 for _ in range(count)]
    row = [torch.randn(SHAPE[:2] + SHAPE[3:], generator=source, dtype=torch.float64) for _ in range(rows)]
    return [x.to(dtype) for x in wide] + [x.to(dtype if dtype == torch.float64 else torch.float32) for x in row]


def slow_adaln(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Token by token, with the row of the token's frame."""
    out = torch.empty(SHAPE, dtype=torch.float64)
    for b in range(SHAPE[0]):
        for f in range(SHAPE[1]):
            for t in range(SHAPE[2]):
                token = x[b, f, t].double()
                centred = token - token.sum() / SHAPE[3]
                normed = centred / (centred.pow(2).sum() / SHAPE[3] + EPS).sqrt()
                out[b, f, t] = normed * (1 + scale[b, f].double()) + shift[b, f].double()
    return out


def slow_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return torch.stack([x[:, :, t].double() + gate.double() * y[:, :, t].double() for t in range(SHAPE[2])], dim=2)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 2**-8)]
)
def test_against_float64(dtype: torch.dtype, tolerance: float) -> None:
    """bf16: the one rounding at the end, at most half a unit in the last of 8 bits; a second one would show wherever
    the shift cancels the normed value."""
    x, y, shift, scale, gate = tensors(dtype, 2, 3)
    close = {"rtol": tolerance, "atol": min(tolerance, 1e-5)}
    out = adaln(x, shift, scale, EPS)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), slow_adaln(x, shift, scale), **close)
    total = gated_residual(x, y, gate)
    assert total.dtype == dtype
    torch.testing.assert_close(total.double(), slow_residual(x, y, gate), **close)
    both = adaln_residual(x, y, gate, shift, scale, EPS)
    assert torch.equal(both[0], total)
    torch.testing.assert_close(both[1].double(), slow_adaln(total, shift, scale), **close)
    plain = adaln_residual(x, y, None, shift, scale, EPS)
    assert plain[0].dtype == plain[1].dtype == dtype
    torch.testing.assert_close(plain[0].double(), x.double() + y.double(), **close)
    torch.testing.assert_close(plain[1].double(), slow_adaln(plain[0], shift, scale), **close)
    weight, bias = scale[0, 0], shift[0, 0]
    affine = layer_norm(x, weight, bias, EPS)
    assert affine.dtype == dtype
    wanted = slow_adaln(x, bias.expand_as(shift), (weight.double() - 1).expand_as(scale))
    torch.testing.assert_close(affine.double(), wanted, **close)


@pytest.mark.parametrize("row_dtype", [torch.float32, torch.bfloat16])
def test_rows_where_they_lie(row_dtype: torch.dtype) -> None:
    """Views of a table and one row expanded over clips and frames are rows as any other, and so are their gradients."""
    x, y = tensors(torch.float32, 2, 0)
    table = torch.randn(*SHAPE[:2], 3, SHAPE[3]).to(row_dtype).requires_grad_()
    one = torch.randn(SHAPE[3]).to(row_dtype).requires_grad_()
    for rows, leaf in ((table.unbind(2), table), ((one.expand(*SHAPE[:2], SHAPE[3]),) * 3, one)):
        results = []
        for shift, scale, gate in (rows, [row.clone(memory_format=torch.contiguous_format) for row in rows]):
            total, out = adaln_residual(x, y, gate, shift, scale, EPS)
            assert total.dtype == out.dtype == torch.float32
            (grad,) = torch.autograd.grad((total + out).square().sum(), leaf)
            assert grad.dtype == row_dtype
            results.append((total, out, grad))
        view, copy = results
        assert torch.equal(view[0], copy[0]) and torch.equal(view[1], copy[1])
        # Sums over other strides may be taken in another order, and those of frames add values rounded to bf16.
        atol = copy[2].abs().max().item() * (1e-6 if row_dtype == torch.float32 else 2**-6)
        torch.testing.assert_close(view[2], copy[2], rtol=0, atol=atol)


def test_layer_norm_of_any_rank() -> None:
    x = torch.randn(5, 8, dtype=torch.bfloat16)
    weight, bias = torch.randn(8, dtype=torch.bfloat16), torch.randn(8)
    wanted = layer_norm(x, weight, bias, EPS)
    assert wanted.dtype == torch.bfloat16
    assert torch.equal(layer_norm(x[None, :, None], weight, bias, EPS)[0, :, 0], wanted)
    assert torch.equal(layer_norm(x[2], weight, bias, EPS), wanted[2])


def test_every_frame_has_its_own_row() -> None:
    x, shift, scale = tensors(torch.float32, 1, 2)
    before = adaln(x, shift, scale, EPS)
    shift[1, 2] += 1.0
    changed = (adaln(x, shift, scale, EPS) != before).flatten(2).any(-1)
    assert changed.tolist() == [[False, False, False], [False, False, True]]


def test_statistics_of_bf16_are_wide() -> None:
    """Around a large mean bf16 statistics would lose everything; the fp32 ones see each value exactly."""
    x = torch.tensor([256.0, 258.0, 260.0, 262.0], dtype=torch.bfloat16).expand(1, 1, 1, 4)
    zero = torch.zeros(1, 1, 4)
    wanted = torch.tensor([-3.0, -1.0, 1.0, 3.0]) / 5**0.5
    torch.testing.assert_close(adaln(x, zero, zero, EPS).float().flatten(), wanted, rtol=4e-3, atol=0)


def test_gradients() -> None:
    small = [t[:1, :2, ..., :4] for t in tensors(torch.float64, 2, 3)]
    x, y, shift, scale, gate = (t.detach().clone().requires_grad_() for t in small)
    assert torch.autograd.gradcheck(lambda *a: adaln(*a, EPS), (x, shift, scale))
    assert torch.autograd.gradcheck(gated_residual, (x, y, gate))
    assert torch.autograd.gradcheck(lambda *a: adaln_residual(*a, EPS), (x, y, gate, shift, scale))
    assert torch.autograd.gradcheck(lambda x, y, *a: adaln_residual(x, y, None, *a, EPS), (x, y, shift, scale))
    weight, bias = (t[0, 0].detach().requires_grad_() for t in (scale, shift))
    assert torch.autograd.gradcheck(lambda *a: layer_norm(*a, EPS), (x, weight, bias))


@pytest.mark.parametrize("shape", [(2, 16), (2, 1, 16), (1, 3, 16), (2, 3, 1), (2, 3, 4, 16)])
@pytest.mark.parametrize("call", [lambda x, r: adaln(x, r, r, EPS), lambda x, r: gated_residual(x, x, r)])
def test_a_row_that_would_broadcast_is_an_error(
    call: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    (x,) = tensors(torch.float32, 1, 0)
    with pytest.raises(ValueError, match=r"modulation .* expected \[B,F,D\]"):
        call(x, torch.zeros(shape))
