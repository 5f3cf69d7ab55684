"""Triton kernels of `split_heads`: one launch forward, one backward and one for the weights' gradients.

Legend: B batch, F frames, T tokens a frame, N heads, K head size, D = N·K, n parts that are normed; a row is a token.
Every program takes whole rows of one part as tiles of pairs (first, second) [N,K/2], so that rotation and its inverse
happen in registers. Per row, with g the gradient rotated back and m = x·rstd (Zhang and Sennrich 2019, eq. 4):

    dw = sum over rows of g·m        dx = rstd·(g·w - m·mean(g·w·m))

Nothing is tuned at run time and nothing is added atomically: equal inputs give equal bits.
"""

# The arguments of a kernel have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


class Launch(NamedTuple):
    """How a kernel spreads over the device; `rows` a program takes forward, `programs` a part backward."""

    warps: int
    stages: int
    rows: int = 0
    programs: int = 0


def forward_launch(width: int, itemsize: int) -> Launch:
    """For rows of `width` elements of `itemsize` bytes."""
    if width <= 2048:
        return Launch(warps=max(1, _warps(width, 40)), stages=3 if width > 1024 else 1, rows=4 if width > 1024 else 2)
    return Launch(warps=_warps(width, 20), stages=1, rows=2)


def backward_launch(width: int, itemsize: int) -> Launch:
    """For rows of `width` elements of `itemsize` bytes. The number of programs bounds the partial sums of the weights'
    gradients, 4·programs·D bytes a part written and read."""
    if width <= 2048:
        return Launch(warps=2, stages=3, programs=264)
    return Launch(warps=_warps(width, 12), stages=1, programs=528)


def _warps(width: int, per_thread: int) -> int:
    """Warps that give a thread at most about `per_thread` elements of a row.

    At 12 heads of 128 or 64 this leaves no more angles (K/2) than threads, which keeps them in each thread's layout:
    with fewer warps the compiler loads them once and exchanges them through shared memory, row by row."""
    return min(16, triton.next_power_of_2(triton.cdiv(width, 32 * per_thread)))


@triton.jit
def _load_pairs(row, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
                INTERLEAVED: tl.constexpr):  # fmt: skip
    """First and second members, fp32 [BLOCK_HEADS, BLOCK_HALF], of the pairs of the row at `row`; zeros outside."""
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    if INTERLEAVED:
        # One load of whole rows: a thread's vector holds whole pairs, so the split moves no data between threads.
        column = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        mask = (head < HEADS) & (column < 2 * HALF)
        tile = tl.load(row + head * (2 * HALF) + column, mask=mask, other=0.0)
        first, second = tl.split(tl.reshape(tile, (BLOCK_HEADS, BLOCK_HALF, 2)))
    else:
        column = tl.arange(0, BLOCK_HALF)[None, :]
        mask = (head < HEADS) & (column < HALF)
        first = tl.load(row + head * (2 * HALF) + column, mask=mask, other=0.0)
        second = tl.load(row + head * (2 * HALF) + column + HALF, mask=mask, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_pairs(row, first, second, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr,
                 BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr):  # fmt: skip
    """The inverse of _load_pairs; rounds to the type of `row`."""
    first, second = first.to(row.dtype.element_ty), second.to(row.dtype.element_ty)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        mask = (head < HEADS) & (column < 2 * HALF)
        tile = tl.reshape(tl.join(first, second), (BLOCK_HEADS, 2 * BLOCK_HALF))
        tl.store(row + head * (2 * HALF) + column, tile, mask=mask)
    else:
        column = tl.arange(0, BLOCK_HALF)[None, :]
        mask = (head < HEADS) & (column < HALF)
        tl.store(row + head * (2 * HALF) + column, first, mask=mask)
        tl.store(row + head * (2 * HALF) + column + HALF, second, mask=mask)


@triton.jit
def _load_angle(cos, sin, row, period, repeat, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """cos and sin [1, BLOCK_HALF] of a row; `repeat` rows share an angle and angles repeat after `period` of them."""
    column = tl.arange(0, BLOCK_HALF)[None, :]
    at = (row // repeat) % period * HALF + column
    return tl.load(cos + at, mask=column < HALF, other=0.0), tl.load(sin + at, mask=column < HALF, other=0.0)


@triton.jit(do_not_specialize=["rows", "period", "repeat"])
def _forward(x, w0, w1, w2, cos, sin, out, rstd, x_stride, rows, period, repeat, eps, PARTS: tl.constexpr,
             HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
             INTERLEAVED: tl.constexpr, ROTATE: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """x: rows x_stride apart; out [PARTS,rows,D] in x's dtype; rstd fp32 [PARTS,rows]; PARTS counts normed parts."""
    part = tl.program_id(0) % PARTS
    start = tl.program_id(0) // PARTS
    width: tl.constexpr = 2 * HEADS * HALF
    x_stride = x_stride.to(tl.int64)
    x += part * width
    out += part * rows.to(tl.int64) * width
    rstd += part * rows.to(tl.int64)
    weight = w0 if part == 0 else (w1 if part == 1 else w2)
    wa, wb = _load_pairs(weight, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF, INTERLEAVED)
    for row in tl.range(start, rows, tl.num_programs(0) // PARTS, num_stages=STAGES):
        a, b = _load_pairs(x + row * x_stride, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF, INTERLEAVED)
        scale = tl.rsqrt(tl.sum(a * a + b * b) / width + eps)
        tl.store(rstd + row, scale)
        a, b = a * scale * wa, b * scale * wb
        if ROTATE:
            c, s = _load_angle(cos, sin, row, period, repeat, HALF, BLOCK_HALF)
            a, b = a * c - b * s, a * s + b * c
        to = out + row * tl.full((), width, tl.int64)
        _store_pairs(to, a, b, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF, INTERLEAVED)


@triton.jit(do_not_specialize=["rows", "period", "repeat"])
def _backward(x, w0, w1, w2, cos, sin, g0, g1, g2, dx, rstd, partial, x_stride, g0_stride, g1_stride, g2_stride, rows,
              period, repeat, PARTS: tl.constexpr, NORMED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
              BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr, INTERLEAVED: tl.constexpr, ROTATE: tl.constexpr,
              WEIGHTS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """g0 to g2: gradients of the parts, rows their strides apart; dx [rows,PARTS·D] in x's dtype; with WEIGHTS,
    partial fp32 [programs,NORMED,D], a row for each program of a part."""
    part = tl.program_id(0) % PARTS
    start = tl.program_id(0) // PARTS
    step = tl.num_programs(0) // PARTS
    width: tl.constexpr = 2 * HEADS * HALF
    dx_stride = tl.full((), PARTS * width, tl.int64)
    x_stride, g0_stride = x_stride.to(tl.int64), g0_stride.to(tl.int64)
    g1_stride, g2_stride = g1_stride.to(tl.int64), g2_stride.to(tl.int64)
    g_stride = g0_stride if part == 0 else (g1_stride if part == 1 else g2_stride)
    g = g0 if part == 0 else (g1 if part == 1 else g2)
    x += part * width
    dx += part * width
    if part < NORMED:
        rstd += part * rows.to(tl.int64)
        weight = w0 if part == 0 else (w1 if part == 1 else w2)
        wa, wb = _load_pairs(weight, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF, INTERLEAVED)
        sum_a = tl.zeros((BLOCK_HEADS, BLOCK_HALF), tl.float32)
        sum_b = tl.zeros((BLOCK_HEADS, BLOCK_HALF), tl.float32)
        for row in tl.range(start, rows, step, num_stages=STAGES):
            a, b = _load_pairs(x + row * x_stride, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF, INTERLEAVED)
            ga, gb = _load_pairs(g + row * g_stride, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF, INTERLEAVED)
            scale = tl.load(rstd + row)
            a, b = a * scale, b * scale
            if ROTATE:
                c, s = _load_angle(cos, sin, row, period, repeat, HALF, BLOCK_HALF)
                ga, gb = ga * c + gb * s, gb * c - ga * s
            if WEIGHTS:
                sum_a += ga * a
                sum_b += gb * b
            ga, gb = ga * wa, gb * wb
            mean = tl.sum(ga * a + gb * b) / width
            da, db = scale * (ga - a * mean), scale * (gb - b * mean)
            _store_pairs(dx + row * dx_stride, da, db, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF, INTERLEAVED)
        if WEIGHTS:
            to = partial + (start * NORMED + part) * width
            _store_pairs(to, sum_a, sum_b, HEADS, HALF, BLOCK_HEADS, BLOCK_HALF, INTERLEAVED)
    else:
        column = tl.arange(0, 2 * BLOCK_HEADS * BLOCK_HALF)
        for row in tl.range(start, rows, step, num_stages=STAGES):
            tile = tl.load(g + row * g_stride + column, mask=column < width)
            tl.store(dx + row * dx_stride + column, tile, mask=column < width)


@triton.jit
def _column_sums(partial, out, rows, width, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """out [width], rounded to its dtype: the sums over the rows of partial fp32 [rows,width], in a fixed order."""
    column = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), tl.float32)
    for start in range(0, rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)[:, None]
        total += tl.load(partial + row * width + column, mask=(row < rows) & (column < width), other=0.0)
    column = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < width)


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor | None, sin: Tensor | None, parts: int, heads: int, eps: float,
        interleaved: bool, *weights: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.set_materialize_grads(False)
        batch, frames, tokens, packed = x.shape
        normed, width, rows = len(weights), packed // parts, batch * frames * tokens
        wide, stride = _uniform_rows(x)
        weights = tuple(weight.contiguous() for weight in weights)
        if cos is not None and sin is not None:
            cos, sin = cos.contiguous(), sin.contiguous()
        out = torch.empty((normed, batch, frames, tokens, heads, width // heads), dtype=x.dtype, device=x.device)
        rstd = torch.empty((normed, rows), dtype=torch.float32, device=x.device)
        ctx.tile = _tile(heads, width, interleaved, cos)
        # Row (b, f, t) takes angle (f, t), or f where a frame has one angle: its number within the clip, or over T.
        ctx.angles = (frames * tokens, 1) if cos is None or cos.shape[1] == tokens else (frames, tokens)
        how = forward_launch(width, x.element_size())
        _forward[(normed * triton.cdiv(rows, how.rows),)](
            wide, *_three(weights), wide if cos is None else cos, wide if sin is None else sin, out, rstd, stride,
            rows, *ctx.angles, eps, normed, *ctx.tile, how.stages, num_warps=how.warps,
        )  # fmt: skip
        ctx.save_for_backward(wide, cos, sin, rstd, *weights)
        ctx.parts = parts
        passed = x[..., normed * width :].unflatten(-1, (parts - normed, heads, -1)).unbind(3) if normed < parts else ()
        return (*out.unbind(0), *passed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, cos, sin, rstd, *weights = ctx.saved_tensors
        normed, parts, rows = len(weights), ctx.parts, rstd.shape[1]
        width = weights[0].numel()
        # A part that nothing used has a gradient of zeros: one row of them, over and over.
        strided = [(x.new_zeros(width), 0) if g is None else _uniform_rows(g) for g in gradients]
        tensors, strides = zip(*strided, strict=True)
        how = backward_launch(width, x.element_size())
        programs = min(rows, how.programs)
        wanted = ctx.needs_input_grad[7:]
        dx = torch.empty((*x.shape[:3], parts * width), dtype=x.dtype, device=x.device)
        partial = torch.empty((programs, normed, width) if any(wanted) else 1, dtype=torch.float32, device=x.device)
        _backward[(parts * programs,)](
            x, *_three(weights), x if cos is None else cos, x if sin is None else sin, *_three(tensors), dx, rstd,
            partial, _row_stride(x), *_three(strides), rows, *ctx.angles, parts, normed, *ctx.tile, any(wanted),
            how.stages, num_warps=how.warps,
        )  # fmt: skip
        if not any(wanted):
            return (dx, *(None,) * (6 + normed))
        sums = torch.empty((normed, width), dtype=weights[0].dtype, device=x.device)
        _column_sums[(triton.cdiv(normed * width, 32),)](partial, sums, programs, normed * width, 128, 32, num_warps=8)
        return (dx, *(None,) * 6, *(one if want else None for one, want in zip(sums, wanted, strict=True)))


def _tile(heads: int, width: int, interleaved: bool, cos: Tensor | None) -> tuple[int, int, int, int, bool, bool]:
    """HEADS to ROTATE of the kernels: the pairs of a row, and the powers of two that hold them."""
    half = width // heads // 2
    return heads, half, triton.next_power_of_2(heads), triton.next_power_of_2(half), interleaved, cos is not None


def _three(items: Sequence[Any]) -> tuple[Any, Any, Any]:
    """The kernels take three of each; they never touch those beyond the parts."""
    return items[0], items[min(1, len(items) - 1)], items[-1]


def _uniform_rows(x: Tensor) -> tuple[Tensor, int]:
    """x [B,F,T,...] with rows (its last dimensions) contiguous and equally far apart, and how far; copied if not so."""
    stride = _row_stride(x)
    return (x, stride) if stride is not None else (x.contiguous(), x[0, 0, 0].numel())


def _row_stride(x: Tensor) -> int | None:
    """Distance between the rows of x [B,F,T,...], None where rows are not contiguous or not equally far apart."""
    if x.is_contiguous():
        return x[0, 0, 0].numel()  # not the stride, which means nothing where T is 1
    expected = 1
    for size, stride in zip(x.shape[:2:-1], x.stride()[:2:-1], strict=True):
        if size > 1 and stride != expected:
            return None
        expected *= size
    lead = [(size, stride) for size, stride in zip(x.shape[2::-1], x.stride()[2::-1], strict=True) if size > 1]
    if any(outer[1] != inner[0] * inner[1] for inner, outer in pairwise(lead)):
        return None
    return lead[0][1] if lead else expected


def split_heads(
    x: Tensor,
    weights: Sequence[Tensor],
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    parts: int,
    heads: int,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, ...]:
    """As reference.split_heads, for x in fp32, bf16 or fp16, at most three parts and at least one weight.

    weights share a dtype, which may differ from x's; cos and sin are fp32. The normed parts are contiguous.
    """
    _check(x, weights, cos, sin, parts, heads)
    return _SplitHeads.apply(x, cos, sin, parts, heads, eps, interleaved, *weights)


def _check(
    x: Tensor, weights: Sequence[Tensor], cos: Tensor | None, sin: Tensor | None, parts: int, heads: int
) -> None:
    """Raise ValueError for what the kernels would misread: they see addresses, not shapes."""
    if not 1 <= len(weights) <= parts <= 3:
        raise ValueError(f"{len(weights)} weights for {parts} parts: expected at least 1 weight and at most 3 parts")
    if x.dim() != 4 or x.shape[3] % (2 * parts * heads):
        raise ValueError(f"x {tuple(x.shape)}: expected [B,F,T,{parts}·D] with {heads} heads of an even size")
    width = x.shape[3] // parts
    if any(weight.shape != (width,) or weight.dtype != weights[0].dtype for weight in weights):
        raise ValueError(f"weights {[(*w.shape, w.dtype) for w in weights]}: expected [{width}], all of one dtype")
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin: expected both or neither")
    for angle in (cos, sin):
        if angle is not None and (
            angle.dtype != torch.float32
            or angle.shape[0] != x.shape[1]
            or angle.shape[1] not in (1, x.shape[2])
            or angle.shape[2] != width // heads // 2
            or angle.shape != cos.shape  # type: ignore[union-attr]
        ):
            raise ValueError(f"cos or sin {tuple(angle.shape)} {angle.dtype} for x {tuple(x.shape)}: expected fp32 "
                             f"[F,T or 1,{width // heads // 2}]")  # fmt: skip
