"""AdamW's step in PyTorch operations against torch.optim in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.adamw_cases import RATES, check_steps

from megatron_ext.kernels.adamw.reference import Moments, adamw_step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 1000])
def test_against_float64(count: int, dtype: torch.dtype) -> None:
    check_steps(adamw_step, count, dtype)


def test_other_tensors_are_refused() -> None:
    def some(count: int = 4, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.ones(count, dtype=dtype)

    good = {"weights": some(), "mean": some(), "square": some(), "grad": some(), "copy": some()}
    wrong = [("mean", some(3)), ("square", some(dtype=torch.bfloat16)), ("grad", some(5)), ("copy", some(8)[::2])]
    for name, tensor in wrong:
        case = good | {name: tensor}
        with pytest.raises(ValueError, match=rf"{name} .*expected"):
            moments = Moments(case["mean"], case["square"])
            adamw_step(case["weights"], moments, case["grad"], case["copy"], RATES, 1.0, 1)
