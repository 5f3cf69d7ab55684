"""Adaptive LayerNorm in Triton: the functions of `reference.py`, one kernel each way, another to sum row gradients.

x, y [B,F,T,D] in fp32, bf16 or fp16; shift, scale, gate [B,F,D] in any float dtype and with any strides, read where
they lie. Statistics and arithmetic in fp32; results have x's dtype. The gradients of rows are summed in a fixed order,
so equal inputs give equal bits; they are contiguous fp32 [B,F,D] before autograd takes them back to the row's dtype and
shape. Wide tensors are copied only where their tokens do not lie at one stride.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_ext.kernels.adaln import triton_kernels as kernels
from megatron_ext.kernels.adaln.reference import check_rows
from megatron_ext.kernels.adaln.triton_plans import (
    gate_backward_plan,
    gate_forward_plan,
    norm_backward_plan,
    norm_forward_plan,
    power_of_two,
    slabs,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUM_BLOCK = 64


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift, the norm without affine parameters."""
    _check(x, None, shift, scale)
    return _AdaLN.apply(x, shift, scale, eps, 1.0)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y."""
    _check(x, y, gate)
    return _GatedResidual.apply(x, y, gate)


def adaln_residual(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + gate * y, adaln of that sum); without a gate x + y, without a y x alone."""
    _check(x, y, shift, scale, *(() if gate is None else (gate,)))
    gate = None if y is None else gate
    return _AdaLNResidual.apply(x, y, gate, shift, scale, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * weight + bias over the last dimension; x [...,D], weight, bias [D]: one row for all tokens."""
    width = x.shape[-1]
    if weight.shape != (width,) or bias.shape != (width,):
        raise ValueError(f"weight {tuple(weight.shape)}, bias {tuple(bias.shape)} for x {tuple(x.shape)}: expected [D]")
    flat = x.reshape(1, 1, -1, width)
    _check(flat, None)
    return _AdaLN.apply(flat, bias.expand(1, 1, width), weight.expand(1, 1, width), eps, 0.0).view(x.shape)


def _check(x: Tensor, y: Tensor | None, *rows: Tensor) -> None:
    if x.dtype not in DTYPES or x.dim() != 4:
        raise ValueError(f"x {x.dtype} {tuple(x.shape)}: expected [B,F,T,D] in fp32, bf16 or fp16")
    if y is not None and y.shape != x.shape:
        raise ValueError(f"y {tuple(y.shape)} for x {tuple(x.shape)}: expected the same shape")
    for row in rows:
        check_rows(row, x)


def _flat(x: Tensor) -> tuple[Tensor, int]:
    """x, or a copy where its tokens do not lie at one stride, and that stride."""
    if x.is_contiguous():
        return x, x.shape[-1]
    step, reach = -1, -1
    for size, stride in zip(x.shape[2::-1], x.stride()[2::-1], strict=True):
        if size == 1:
            continue
        if step < 0:
            step = reach = stride
        if stride != reach:
            return x.contiguous(), x.shape[-1]
        reach = stride * size
    if x.stride(3) != 1 and x.shape[3] > 1:
        return x.contiguous(), x.shape[-1]
    return x, max(step, 0)


def _norm_forward(
    x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float, one: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> x as read, total (x itself without y), out, stats [2,B*F*T] fp32."""
    clips, frames, tokens, width = x.shape
    x, x_step = _flat(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stats = torch.empty((2, clips * frames * tokens), dtype=torch.float32, device=x.device)
    total, y_step = x, x_step
    if y is not None:
        y, y_step = _flat(y)
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    gate_or_any = shift if gate is None else gate
    plan = norm_forward_plan(width, x.element_size(), 1 if y is None else 2)
    splits, slab = slabs(clips * frames, tokens, plan.rows, plan.programs)
    kernels.adaln_forward[(clips * frames * splits,)](
        x, x if y is None else y, gate_or_any, shift, scale, total, out, stats,
        x_step, y_step, *gate_or_any.stride(), *shift.stride(), *scale.stride(),
        frames, tokens, stats.shape[1], splits, slab, eps,
        D=width, ONE=one, RESIDUAL=y is not None, GATED=gate is not None,
        ROWS=plan.rows, BLOCK=plan.block, TAIL=plan.tail, STAGES=plan.stages, EVICT=plan.evict, num_warps=plan.warps,
    )  # fmt: skip
    return x, total, out, stats


def _norm_backward(
    dout: Tensor, dtotal: Tensor | None, x: Tensor, y: Tensor | None, gate: Tensor | None,
    scale: Tensor, stats: Tensor, one: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> dx, dy (dx itself without a gate), row gradients [2 or 3,B,F,D] fp32: shift, scale, gate."""
    clips, frames, tokens, width = x.shape
    dout, dout_step = _flat(dout)
    x, x_step = _flat(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dtotal_or_any, dtotal_step = (dout, dout_step) if dtotal is None else _flat(dtotal)
    dy, y_step = dx, x_step
    if gate is not None:
        assert y is not None
        dy = torch.empty(x.shape, dtype=y.dtype, device=x.device)
        y, y_step = _flat(y)
    gate_or_any = scale if gate is None else gate
    streams = 2 + (dtotal is not None) + (gate is not None)
    plan = norm_backward_plan(width, x.element_size(), streams)
    splits, slab = slabs(clips * frames, tokens, plan.rows, plan.programs)
    sums = 2 if gate is None else 3
    partial = torch.empty((sums, clips * frames, splits, width), dtype=torch.float32, device=x.device)
    kernels.adaln_backward[(clips * frames * splits,)](
        dout, dtotal_or_any, x, x if gate is None else y, gate_or_any, scale, stats, dx, dy, partial,
        dout_step, dtotal_step, x_step, y_step, *gate_or_any.stride(), *scale.stride(),
        frames, tokens, stats.shape[1], splits, slab,
        D=width, ONE=one, ADDED=dtotal is not None, GATED=gate is not None,
        ROWS=plan.rows, BLOCK=plan.block, TAIL=plan.tail, STAGES=plan.stages, EVICT=plan.evict, num_warps=plan.warps,
    )  # fmt: skip
    return dx, dy, _sum_splits(partial, splits).view(sums, clips, frames, width)


def _gate_forward(x: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """-> x + gate * y, and y as read."""
    clips, frames, tokens, width = x.shape
    x, x_step = _flat(x)
    y, y_step = _flat(y)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    plan = gate_forward_plan(width, x.element_size())
    columns = -(-width // plan.block)
    splits, slab = slabs(clips * frames, tokens, plan.rows, plan.programs // columns)
    kernels.gated_forward[(clips * frames * splits * columns,)](
        x, y, gate, out, x_step, y_step, *gate.stride(), frames, tokens, splits, slab,
        D=width, ROWS=plan.rows, BLOCK=plan.block, STAGES=plan.stages, EVICT=plan.evict, num_warps=plan.warps,
    )  # fmt: skip
    return out, y


def _gate_backward(dout: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """-> dy, dgate [B,F,D] fp32."""
    clips, frames, tokens, width = y.shape
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    dout, dout_step = _flat(dout)
    y, y_step = _flat(y)
    plan = gate_backward_plan(width, y.element_size())
    columns = -(-width // plan.block)
    splits, slab = slabs(clips * frames, tokens, plan.rows, plan.programs // columns)
    partial = torch.empty((1, clips * frames, splits, width), dtype=torch.float32, device=y.device)
    kernels.gated_backward[(clips * frames * splits * columns,)](
        dout, y, gate, dy, partial, dout_step, y_step, *gate.stride(), frames, tokens, splits, slab,
        D=width, ROWS=plan.rows, BLOCK=plan.block, STAGES=plan.stages, EVICT=plan.evict, num_warps=plan.warps,
    )  # fmt: skip
    return dy, _sum_splits(partial, splits).view(clips, frames, width)


def _sum_splits(partial: Tensor, splits: int) -> Tensor:
    """[K,N,splits,D] -> [K,N,D]."""
    if splits == 1:
        return partial
    sums, groups, _, width = partial.shape
    out = torch.empty((sums, groups, width), dtype=torch.float32, device=partial.device)
    kernels.sum_splits[(sums * groups * triton.cdiv(width, SUM_BLOCK),)](
        partial, out, splits, D=width, SPLITS=min(64, power_of_two(splits)), BLOCK=SUM_BLOCK, num_warps=4
    )
    return out


class _AdaLN(Function):
    """`one` is added to the scale: 1 for a modulation, 0 for a plain weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float, one: float) -> Tensor:
        x, _, out, stats = _norm_forward(x, None, None, shift, scale, eps, one)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, scale, stats)
        ctx.one = one
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None:
            return None, None, None, None, None
        x, scale, stats = ctx.saved_tensors
        dx, _, rows = _norm_backward(dout, None, x, None, None, scale, stats, ctx.one)
        return dx, rows[0], rows[1], None, None


class _AdaLNResidual(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        _, total, out, stats = _norm_forward(x, y, gate, shift, scale, eps, 1.0)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, None if gate is None else y, gate, scale, stats)
        ctx.alone = y is None
        return total, out  # without a y autograd makes a view of x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor | None, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        total, y, gate, scale, stats = ctx.saved_tensors
        if dout is not None:
            dx, dy, rows = _norm_backward(dout, dtotal, total, y, gate, scale, stats, 1.0)
            return dx, None if ctx.alone else dy, None if gate is None else rows[2], rows[0], rows[1], None
        if dtotal is None or gate is None:
            return dtotal, None if ctx.alone else dtotal, None, None, None, None
        dy, dgate = _gate_backward(dtotal, y, gate)
        return dtotal, dy, dgate, None, None, None


class _GatedResidual(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        out, y = _gate_forward(x, y, gate)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, gate)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if dout is None or not any(ctx.needs_input_grad[1:]):
            return dout, None, None
        y, gate = ctx.saved_tensors
        dy, dgate = _gate_backward(dout, y, gate)
        return dout, dy, dgate
