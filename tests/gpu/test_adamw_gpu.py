"""AdamW in one pass on a GPU, and that a ZeRO-3 engine there takes it."""

from __future__ import annotations

import pytest
import torch
from helpers.adamw_cases import RATES, check_steps

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("count", [0, 1, 1023, 1 << 20, (1 << 20) + 5])
def test_against_float64(count: int, dtype: torch.dtype) -> None:
    from megatron_ext.kernels.adamw.triton import adamw_step

    check_steps(adamw_step, count, dtype, "cuda")


def test_twice_the_same_bits() -> None:
    from megatron_ext.kernels.adamw.reference import Moments
    from megatron_ext.kernels.adamw.triton import adamw_step

    count, found = 100_003, []
    grad, start = torch.randn(count, device="cuda").bfloat16(), torch.randn(count, device="cuda")
    for _ in range(2):
        weights, moments = start.clone(), Moments(*torch.zeros(2, count, device="cuda"))
        copy = torch.empty(count, device="cuda", dtype=torch.bfloat16)
        for number in (1, 2, 3):
            adamw_step(weights, moments, grad, copy, RATES, 1.0, number)
        found.append(torch.stack((weights, moments.mean, moments.square)))
    assert torch.equal(*found)
