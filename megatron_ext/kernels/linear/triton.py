"""Sums that the backward of linear layers needs, in Triton: the functions of `reference.py`.

x, hidden, grad [...,D] in fp32, bf16 or fp16, copied only where their rows do not lie at one stride. Every program sums
a slab of rows in fp32, and a second launch adds the slabs up, in an order that shapes and strides alone decide: equal
inputs give equal bits. Nothing waits for the device or is tuned at run time, so CUDA graphs can record the launches.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from megatron_ext.kernels.linear import triton_kernels as kernels
from megatron_ext.kernels.linear.reference import check_pair
from megatron_ext.kernels.linear.triton_plans import Plan, final_plan, gelu_plan, sum_plan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def column_sum(x: Tensor) -> Tensor:
    """[...,D] -> [D], in x's dtype."""
    _check(x)
    rows, step = _rows(x)
    count, width = rows.shape
    if count == 0:
        return x.new_zeros(width)
    plan = sum_plan(count, width, x.element_size())
    sums = _sums(x, plan, width)
    kernels.sum_rows[_programs(plan, width)](rows, sums, step, count, plan.slab, **_options(plan, width))
    return _total(sums, x.dtype)


def gelu_backward(hidden: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> activation [...,D], gradient of hidden [...,D], and the column sum [D] of the latter as rounded; all in
    hidden's dtype, the first two contiguous."""
    _check(hidden)
    check_pair(hidden, grad)
    activation = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    by_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    (h, h_step), (g, g_step) = _rows(hidden), _rows(grad)
    count, width = h.shape
    if count == 0:
        return activation, by_hidden, hidden.new_zeros(width)
    plan = gelu_plan(count, width, hidden.element_size())
    sums = _sums(hidden, plan, width)
    kernels.gelu_backward[_programs(plan, width)](
        h, g, activation, by_hidden, sums, h_step, g_step, count, plan.slab, **_options(plan, width)
    )
    return activation, by_hidden, _total(sums, hidden.dtype)


def _check(x: Tensor) -> None:
    if x.dtype not in DTYPES or x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{x.dtype} {tuple(x.shape)}: expected [...,D] with D > 0 in fp32, bf16 or fp16")


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x as [rows,D], copied where rows are not contiguous or not equally far apart, and how far apart they are."""
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    if rows.stride(1) != 1 and width > 1:
        rows = rows.contiguous()
    return rows, rows.stride(0) if rows.shape[0] > 1 else width  # a single row may have any stride


def _programs(plan: Plan, width: int) -> tuple[int]:
    return (plan.splits * triton.cdiv(width, plan.block),)


def _options(plan: Plan, width: int) -> dict[str, int]:
    """What a kernel is compiled for."""
    return {"D": width, "LINES": plan.lines, "BLOCK": plan.block, "STAGES": plan.stages, "num_warps": plan.warps}


def _sums(x: Tensor, plan: Plan, width: int) -> Tensor:
    """Room for the sums [splits,D] of the slabs; that of a single slab is the result and has its dtype."""
    dtype = x.dtype if plan.splits == 1 else torch.float32
    return torch.empty((plan.splits, width), dtype=dtype, device=x.device)


def _total(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """[splits,D] -> [D]."""
    splits, width = sums.shape
    if splits == 1:
        return sums[0]
    out = torch.empty((width,), dtype=dtype, device=sums.device)
    plan = final_plan(splits)
    kernels.sum_rows[_programs(plan, width)](sums, out, width, splits, plan.slab, **_options(plan, width))
    return out
