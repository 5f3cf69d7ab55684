"""AdamW in one pass in Triton's interpreter on the CPU.

Collected by `test_adamw_interpreted.py` only, in a process of its own: Triton reads TRITON_INTERPRET at its import.
"""

from __future__ import annotations

import pytest
import torch
from helpers.adamw_cases import RATES, check_steps

from megatron_ext.kernels.adamw.reference import Moments
from megatron_ext.kernels.adamw.triton import BLOCK, adamw_step


@pytest.mark.parametrize("count", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
def test_against_float64(count: int) -> None:
    check_steps(adamw_step, count, torch.float32)


def test_a_gradient_in_bf16() -> None:
    """What it is in fp32; the copy is cut off by the interpreter where a GPU rounds to nearest."""
    grad = torch.randn(70).bfloat16()
    found = []
    for one in (grad, grad.float()):
        weights, moments = torch.ones(70), Moments(torch.zeros(70), torch.zeros(70))
        copy = torch.empty(70, dtype=one.dtype)
        adamw_step(weights, moments, one, copy, RATES, 2.0, 1)
        torch.testing.assert_close(copy.float(), weights, rtol=2**-7, atol=0)
        found.append(torch.stack((weights, moments.mean, moments.square)))
    assert torch.equal(*found)


def test_nothing_beyond_the_end_is_written() -> None:
    room = torch.full((40,), 7.0)
    weights, mean, square, copy = (room.clone() for _ in range(4))
    parts = [x[:33] for x in (weights, mean, square, copy)]
    adamw_step(parts[0], Moments(parts[1], parts[2]), torch.ones(33), parts[3], RATES, 1.0, 1)
    for x in (weights, mean, square, copy):
        assert torch.equal(x[33:], room[33:]) and not (x[:33] == 7.0).any()
