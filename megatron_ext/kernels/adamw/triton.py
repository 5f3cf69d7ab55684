"""AdamW in one pass in Triton: the function of `reference.py`, in fp32 whatever the gradient's dtype.

Apart they move 40 bytes a parameter: 6 to scale a bf16 gradient into fp32, 28 for AdamW, 6 for the copy in bf16. In one
pass it is 28. Nothing waits for the device.
"""

# Kernel parameters are typed at the call.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_ext.kernels.adamw.reference import Moments, Rates, check, corrections

BLOCK, WARPS = 1024, 4  # eight values a thread: one load of 16 bytes in bf16


def adamw_step(
    weights: Tensor, moments: Moments, grad: Tensor, copy: Tensor, rates: Rates, scale: float, number: int
) -> None:
    """See the reference."""
    check(weights, moments, grad, copy)
    if weights.numel() == 0:
        return
    size, correction = corrections(rates, number)
    _adamw[(triton.cdiv(weights.numel(), BLOCK),)](
        weights, moments.mean, moments.square, grad, copy, weights.numel(), scale, size, correction,
        1 - rates.lr * rates.weight_decay, 1 - rates.betas[0], rates.betas[1], 1 - rates.betas[1], rates.eps,
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


@triton.jit(do_not_specialize=("count",))
def _adamw(
    weights, mean, square, grad, copy, count, scale, size, correction, keep, rest_1, beta_2, rest_2, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    g = tl.load(grad + at, mask, other=0.0).to(tl.float32) * scale
    m = tl.load(mean + at, mask, other=0.0)
    v = tl.load(square + at, mask, other=0.0)
    w = tl.load(weights + at, mask, other=0.0)
    m += rest_1 * (g - m)
    v = beta_2 * v + rest_2 * g * g
    w = w * keep - size * m / (tl.sqrt(v) * correction + eps)
    tl.store(mean + at, m, mask)
    tl.store(square + at, v, mask)
    tl.store(weights + at, w, mask)
    tl.store(copy + at, w.to(copy.dtype.element_ty), mask)
