"""AdamW's step against float64: inputs, and what is allowed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_ext.kernels.adamw.reference import Moments, Rates

RATES = Rates(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
STEPS = 3
# A handful of roundings of fp32 (2^-24 each) in every step; a moment may cancel, hence the absolute part.
RTOL, ATOL = 2**-20, 2**-24


def check_steps(adamw_step: Any, count: int, dtype: torch.dtype, device: str = "cpu", scale: float = 0.37) -> None:
    """Some steps from zero moments, each with another gradient, against torch's AdamW in float64."""
    source = torch.Generator(device).manual_seed(count)

    def some() -> Tensor:
        return torch.randn(count, generator=source, device=device)

    weights = some()
    wide = weights.double().requires_grad_()
    exact = torch.optim.AdamW([wide], **RATES._asdict())
    moments = Moments(torch.zeros_like(weights), torch.zeros_like(weights))
    for number in range(1, STEPS + 1):
        grad, copy = some().to(dtype), torch.full((count,), torch.nan, dtype=dtype, device=device)
        adamw_step(weights, moments, grad, copy, RATES, scale, number)
        wide.grad = grad.double() * scale
        exact.step()
        assert torch.equal(copy, weights.to(dtype))
    state = exact.state[wide]
    for found, wanted in ((weights, wide), (moments.mean, state["exp_avg"]), (moments.square, state["exp_avg_sq"])):
        torch.testing.assert_close(found.double(), wanted.detach(), rtol=RTOL, atol=ATOL)
