"""Triton kernels of linear layers; `triton_plans.py` plans and `triton.py` launches them.

Legend: a *slab* is a run of consecutive rows; a program takes BLOCK columns of one slab and walks down it, LINES rows
at a time, `splits` slabs in all. Matrices [rows,D] are read with one stride a row (`*_step`) and unit stride along D,
and written contiguous. Arithmetic is fp32 whatever the tensors hold.
"""

# Kernel parameters are typed at the call.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(rows, slab, D: tl.constexpr, BLOCK: tl.constexpr):
    """-> number of the slab, its first row (int64: a matrix may have more than 2^31 values), its rows, the columns."""
    columns: tl.constexpr = (D + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    split = (pid // columns).to(tl.int64)
    first = split * slab
    return split, first, tl.minimum(slab, rows - first).to(tl.int32), (pid % columns) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _tile(x, at, lines, step, cols, mask):
    """fp32 [LINES,BLOCK] from row `at` on; zeros outside."""
    return tl.load(x + at * step + lines[:, None] * step + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _gelu(h):
    """gelu(h) and gelu'(h). With u = 2 sqrt(2/pi) (h + 0.044715 h^3) and s = sigmoid(u) = (1 + tanh(u/2)) / 2:
    gelu = h s and gelu' = s + h s (1 - s) du/dh."""
    factor: tl.constexpr = 1.5957691216057308  # 2 sqrt(2/pi)
    square = h * h
    # Of -|u|: an exponential that cannot overflow, and s and 1 - s without a difference of nearly equal numbers.
    power = tl.exp(-tl.abs(factor * h * (1 + 0.044715 * square)))
    above = 1 / (1 + power)
    below = power * above
    s = tl.where(h >= 0, above, below)
    return h * s, s + h * (above * below) * (factor * (1 + 0.134145 * square))


@triton.jit(do_not_specialize=("rows", "slab"))
def sum_rows(
    x, out, x_step, rows, slab, D: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    """out [splits,D], rounded to its dtype: the sums over the rows of each slab of x [rows,D]."""
    split, first, count, cols = _place(rows, slab, D, BLOCK)
    lines = tl.arange(0, LINES)
    total = tl.zeros([LINES, BLOCK], tl.float32)
    for row in tl.range(0, count, LINES, num_stages=STAGES):
        mask = (row + lines < count)[:, None] & (cols < D)[None, :]
        total += _tile(x, first + row, lines, x_step, cols, mask)
    tl.store(out + split * D + cols, tl.sum(total, 0), cols < D)


@triton.jit(do_not_specialize=("rows", "slab"))
def gelu_backward(
    hidden, grad, activation, by_hidden, out, hidden_step, grad_step, rows, slab,
    D: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """activation = gelu(hidden), by_hidden = grad * gelu'(hidden); out [splits,D]: the sums over the rows of each slab
    of by_hidden as it was rounded."""
    split, first, count, cols = _place(rows, slab, D, BLOCK)
    lines = tl.arange(0, LINES)
    total = tl.zeros([LINES, BLOCK], tl.float32)
    for row in tl.range(0, count, LINES, num_stages=STAGES):
        at = first + row
        mask = (row + lines < count)[:, None] & (cols < D)[None, :]
        h = _tile(hidden, at, lines, hidden_step, cols, mask)
        g = _tile(grad, at, lines, grad_step, cols, mask)
        value, slope = _gelu(h)
        to = at * D + lines[:, None] * D + cols[None, :]
        tl.store(activation + to, value, mask)
        by = (g * slope).to(by_hidden.dtype.element_ty)
        tl.store(by_hidden + to, by, mask)
        total += by.to(tl.float32)
    tl.store(out + split * D + cols, tl.sum(total, 0), cols < D)
