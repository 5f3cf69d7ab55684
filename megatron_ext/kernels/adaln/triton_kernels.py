"""Triton kernels of the adaptive LayerNorm; `triton_plans.py` plans and `triton.py` launches them.

Legend: a *frame* is one of the B * F groups of tokens that share a modulation row; a *slab* is a run of consecutive
tokens of one frame that one program walks through, ROWS at a time, `splits` slabs a frame. Wide tensors are read as
[B*F*T, D] with one stride a row (`*_step`) and unit stride along D; rows [B,F,D] are read with their own three strides.
A row of D values is held as BLOCK + TAIL lanes, powers of two, because one power of two would waste up to half of the
registers (5120 in 8192). Arithmetic is fp32 whatever the tensors hold.
"""

# Kernel parameters are typed at the call.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

# Sizes that change with the batch; a kernel for each of their residues would gain nothing.
SIZES = ("frames", "tokens", "count", "splits", "slab")


@triton.jit
def _slab(pid, frames, tokens, splits, slab):
    """-> frame, its clip, its place in the clip, first and last token of the slab."""
    frame = pid // splits
    first = (pid % splits) * slab
    last = tl.minimum(first + slab, tokens)
    clip = (frame // frames).to(tl.int64)
    return frame.to(tl.int64), clip, frame - clip * frames, first, last


@triton.jit
def _row(pointer, cols, step, D: tl.constexpr):
    return tl.load(pointer + cols * step, mask=cols < D, other=0.0).to(tl.float32)


@triton.jit
def _offsets(lines, step, cols):
    return lines[:, None] * step + cols[None, :]


@triton.jit
def _tile(pointer, offsets, mask, EVICT: tl.constexpr):
    return tl.load(pointer + offsets, mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def adaln_forward(
    x, y, gate, shift, scale, total, out, stats,
    x_step, y_step, gate_b, gate_f, gate_d, shift_b, shift_f, shift_d, scale_b, scale_f, scale_d,
    frames, tokens, count, splits, slab, eps,
    D: tl.constexpr, ONE: tl.constexpr, RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """total = x (+ gate * y) in its dtype, out = LN(total) * (ONE + scale) + shift, stats [2,count] = mean and rstd.
    RESIDUAL: there is a y, and total is written; GATED: y has a gate."""
    frame, clip, place, first, last = _slab(tl.program_id(0), frames, tokens, splits, slab)
    gate += clip * gate_b + place * gate_f
    shift += clip * shift_b + place * shift_f
    scale += clip * scale_b + place * scale_f
    base = frame * tokens
    lines = tl.arange(0, ROWS)

    cols_a = tl.arange(0, BLOCK)
    scale_a = _row(scale, cols_a, scale_d, D) + ONE
    shift_a = _row(shift, cols_a, shift_d, D)
    gate_a = _row(gate, cols_a, gate_d, D) if GATED else shift_a
    if TAIL > 0:
        cols_b = BLOCK + tl.arange(0, TAIL)
        scale_b_ = _row(scale, cols_b, scale_d, D) + ONE
        shift_b_ = _row(shift, cols_b, shift_d, D)
        gate_b_ = _row(gate, cols_b, gate_d, D) if GATED else shift_b_

    for row in tl.range(first, last, ROWS, num_stages=STAGES):
        live = row + lines < last
        at = base + row
        mask_a = live[:, None] & (cols_a < D)[None, :]
        x_a = _tile(x + at * x_step, _offsets(lines, x_step, cols_a), mask_a, EVICT)
        if RESIDUAL:
            y_a = _tile(y + at * y_step, _offsets(lines, y_step, cols_a), mask_a, EVICT)
        if TAIL > 0:
            mask_b = live[:, None] & (cols_b < D)[None, :]
            x_b = _tile(x + at * x_step, _offsets(lines, x_step, cols_b), mask_b, EVICT)
            if RESIDUAL:
                y_b = _tile(y + at * y_step, _offsets(lines, y_step, cols_b), mask_b, EVICT)

        # What is normalised is the sum as stored: the backward pass sees no other.
        if RESIDUAL:
            sum_a = (x_a + (y_a * gate_a[None, :] if GATED else y_a)).to(total.dtype.element_ty)
            tl.store(total + at * D + _offsets(lines, D, cols_a), sum_a, mask_a)
            x_a = sum_a.to(tl.float32)
            if TAIL > 0:
                sum_b = (x_b + (y_b * gate_b_[None, :] if GATED else y_b)).to(total.dtype.element_ty)
                tl.store(total + at * D + _offsets(lines, D, cols_b), sum_b, mask_b)
                x_b = sum_b.to(tl.float32)

        mean = tl.sum(x_a, 1)
        if TAIL > 0:
            mean += tl.sum(x_b, 1)
        mean = mean / D
        x_a -= mean[:, None]
        if BLOCK > D:
            x_a = tl.where(mask_a, x_a, 0.0)
        square = tl.sum(x_a * x_a, 1)
        if TAIL > 0:
            x_b -= mean[:, None]
            if BLOCK + TAIL > D:
                x_b = tl.where(mask_b, x_b, 0.0)
            square += tl.sum(x_b * x_b, 1)
        # rsqrt is approximate; an error here would be common to all values of the token.
        rstd = tl.div_rn(1.0, tl.sqrt_rn(square / D + eps))
        tl.store(stats + at + lines, mean, live)
        tl.store(stats + at + count + lines, rstd, live)
        tl.store(out + at * D + _offsets(lines, D, cols_a),
                 x_a * rstd[:, None] * scale_a[None, :] + shift_a[None, :], mask_a)  # fmt: skip
        if TAIL > 0:
            tl.store(out + at * D + _offsets(lines, D, cols_b),
                     x_b * rstd[:, None] * scale_b_[None, :] + shift_b_[None, :], mask_b)  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def adaln_backward(
    dout, dtotal, x, y, gate, scale, stats, dx, dy, partial,
    dout_step, dtotal_step, x_step, y_step, gate_b, gate_f, gate_d, scale_b, scale_f, scale_d,
    frames, tokens, count, splits, slab,
    D: tl.constexpr, ONE: tl.constexpr, ADDED: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """dx = (dtotal +) gradient of the norm's input x, dy = gate * dx; partial [2 or 3,B*F,splits,D]: sums over the slab
    for shift, scale and gate. ADDED: there is a dtotal; GATED: there is a gate, so dy and its sum are written."""
    frame, clip, place, first, last = _slab(tl.program_id(0), frames, tokens, splits, slab)
    gate += clip * gate_b + place * gate_f
    scale += clip * scale_b + place * scale_f
    base = frame * tokens
    lines = tl.arange(0, ROWS)

    cols_a = tl.arange(0, BLOCK)
    scale_a = _row(scale, cols_a, scale_d, D) + ONE
    gate_a = _row(gate, cols_a, gate_d, D) if GATED else scale_a
    dshift_a = tl.zeros([BLOCK], tl.float32)
    dscale_a = tl.zeros([BLOCK], tl.float32)
    dgate_a = tl.zeros([BLOCK], tl.float32)
    if TAIL > 0:
        cols_b = BLOCK + tl.arange(0, TAIL)
        scale_b_ = _row(scale, cols_b, scale_d, D) + ONE
        gate_b_ = _row(gate, cols_b, gate_d, D) if GATED else scale_b_
        dshift_b = tl.zeros([TAIL], tl.float32)
        dscale_b = tl.zeros([TAIL], tl.float32)
        dgate_b = tl.zeros([TAIL], tl.float32)

    for row in tl.range(first, last, ROWS, num_stages=STAGES):
        live = row + lines < last
        at = base + row
        # Padding and dead rows hold zeros in g, so in every sum below; their dx is not stored.
        mask_a = live[:, None] & (cols_a < D)[None, :]
        g_a = _tile(dout + at * dout_step, _offsets(lines, dout_step, cols_a), mask_a, EVICT)
        x_a = _tile(x + at * x_step, _offsets(lines, x_step, cols_a), mask_a, EVICT)
        if ADDED:
            t_a = _tile(dtotal + at * dtotal_step, _offsets(lines, dtotal_step, cols_a), mask_a, EVICT)
        if GATED:
            y_a = _tile(y + at * y_step, _offsets(lines, y_step, cols_a), mask_a, EVICT)
        if TAIL > 0:
            mask_b = live[:, None] & (cols_b < D)[None, :]
            g_b = _tile(dout + at * dout_step, _offsets(lines, dout_step, cols_b), mask_b, EVICT)
            x_b = _tile(x + at * x_step, _offsets(lines, x_step, cols_b), mask_b, EVICT)
            if ADDED:
                t_b = _tile(dtotal + at * dtotal_step, _offsets(lines, dtotal_step, cols_b), mask_b, EVICT)
            if GATED:
                y_b = _tile(y + at * y_step, _offsets(lines, y_step, cols_b), mask_b, EVICT)
        mean = tl.load(stats + at + lines, live, 0.0)[:, None]
        rstd = tl.load(stats + at + count + lines, live, 0.0)[:, None]

        # With n the normalised x and w = g * (ONE + scale): dx = rstd * (w - mean(w) - n * mean(w * n)).
        n_a = (x_a - mean) * rstd
        w_a = g_a * scale_a[None, :]
        plain = tl.sum(w_a, 1)
        along = tl.sum(w_a * n_a, 1)
        dshift_a += tl.sum(g_a, 0)
        dscale_a += tl.sum(g_a * n_a, 0)
        if TAIL > 0:
            n_b = (x_b - mean) * rstd
            w_b = g_b * scale_b_[None, :]
            plain += tl.sum(w_b, 1)
            along += tl.sum(w_b * n_b, 1)
            dshift_b += tl.sum(g_b, 0)
            dscale_b += tl.sum(g_b * n_b, 0)
        plain = (plain / D)[:, None]
        along = (along / D)[:, None]

        d_a = (w_a - plain - n_a * along) * rstd
        if ADDED:
            d_a += t_a
        tl.store(dx + at * D + _offsets(lines, D, cols_a), d_a, mask_a)
        if GATED:
            tl.store(dy + at * D + _offsets(lines, D, cols_a), d_a * gate_a[None, :], mask_a)
            dgate_a += tl.sum(d_a * y_a, 0)
        if TAIL > 0:
            d_b = (w_b - plain - n_b * along) * rstd
            if ADDED:
                d_b += t_b
            tl.store(dx + at * D + _offsets(lines, D, cols_b), d_b, mask_b)
            if GATED:
                tl.store(dy + at * D + _offsets(lines, D, cols_b), d_b * gate_b_[None, :], mask_b)
                dgate_b += tl.sum(d_b * y_b, 0)

    groups = tl.num_programs(0).to(tl.int64)
    partial += tl.program_id(0).to(tl.int64) * D
    tl.store(partial + cols_a, dshift_a, cols_a < D)
    tl.store(partial + groups * D + cols_a, dscale_a, cols_a < D)
    if GATED:
        tl.store(partial + 2 * groups * D + cols_a, dgate_a, cols_a < D)
    if TAIL > 0:
        tl.store(partial + cols_b, dshift_b, cols_b < D)
        tl.store(partial + groups * D + cols_b, dscale_b, cols_b < D)
        if GATED:
            tl.store(partial + 2 * groups * D + cols_b, dgate_b, cols_b < D)


@triton.jit(do_not_specialize=SIZES[:2] + SIZES[3:])
def gated_forward(
    x, y, gate, out, x_step, y_step, gate_b, gate_f, gate_d, frames, tokens, splits, slab,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """out = x + gate * y. Nothing is summed along D, so a program takes BLOCK columns of its slab."""
    columns: tl.constexpr = (D + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    cols = (pid % columns) * BLOCK + tl.arange(0, BLOCK)
    frame, clip, place, first, last = _slab(pid // columns, frames, tokens, splits, slab)
    gate_row = _row(gate + clip * gate_b + place * gate_f, cols, gate_d, D)[None, :]
    base = frame * tokens
    lines = tl.arange(0, ROWS)
    for row in tl.range(first, last, ROWS, num_stages=STAGES):
        at = base + row
        mask = (row + lines < last)[:, None] & (cols < D)[None, :]
        x_tile = _tile(x + at * x_step, _offsets(lines, x_step, cols), mask, EVICT)
        y_tile = _tile(y + at * y_step, _offsets(lines, y_step, cols), mask, EVICT)
        tl.store(out + at * D + _offsets(lines, D, cols), x_tile + gate_row * y_tile, mask)


@triton.jit(do_not_specialize=SIZES[:2] + SIZES[3:])
def gated_backward(
    dout, y, gate, dy, partial, dout_step, y_step, gate_b, gate_f, gate_d, frames, tokens, splits, slab,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """dy = gate * dout; partial [B*F,splits,D]: sums of dout * y over the slab."""
    columns: tl.constexpr = (D + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    group = pid // columns
    cols = (pid % columns) * BLOCK + tl.arange(0, BLOCK)
    frame, clip, place, first, last = _slab(group, frames, tokens, splits, slab)
    gate_row = _row(gate + clip * gate_b + place * gate_f, cols, gate_d, D)[None, :]
    base = frame * tokens
    lines = tl.arange(0, ROWS)
    dgate = tl.zeros([ROWS, BLOCK], tl.float32)
    for row in tl.range(first, last, ROWS, num_stages=STAGES):
        at = base + row
        mask = (row + lines < last)[:, None] & (cols < D)[None, :]
        g = _tile(dout + at * dout_step, _offsets(lines, dout_step, cols), mask, EVICT)
        y_tile = _tile(y + at * y_step, _offsets(lines, y_step, cols), mask, EVICT)
        tl.store(dy + at * D + _offsets(lines, D, cols), g * gate_row, mask)
        dgate += g * y_tile
    tl.store(partial + group.to(tl.int64) * D + cols, tl.sum(dgate, 0), cols < D)


@triton.jit(do_not_specialize=("splits",))
def sum_splits(partial, out, splits, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """out [N,D] = partial [N,splits,D] summed over the splits, always in the same order."""
    columns: tl.constexpr = (D + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    row = (pid // columns).to(tl.int64)
    cols = (pid % columns) * BLOCK + tl.arange(0, BLOCK)
    lines = tl.arange(0, SPLITS)
    partial += row * splits * D
    total = tl.zeros([SPLITS, BLOCK], tl.float32)
    for first in tl.range(0, splits, SPLITS):
        mask = (first + lines < splits)[:, None] & (cols < D)[None, :]
        total += tl.load(partial + first * D + _offsets(lines, D, cols), mask=mask, other=0.0)
    tl.store(out + row * D + cols, tl.sum(total, 0), cols < D)
