"""The gate in front of every measurement: a kernel that disagrees with its reference gets no row.

Outputs and all gradients are compared with the reference in float64, by the norm of the error over that of the value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Call = Callable[[Tensors], Sequence[Tensor]]  # from leaves to outputs

# bf16 keeps 8 bits: rounding a result once costs 2^-9 / sqrt(3) to 2^-8 / sqrt(3) = 1.1e-3 to 2.3e-3 of its norm.
# Attention rounds the probabilities as well, and its gradients pass through two more rounded products.
ATTENTION_BOUND = 6e-3
# One rounding at the end, and one of the sum that a fused residual normalises: 1.7e-3 * sqrt(2) = 2.4e-3.
ELEMENTWISE_BOUND = 4e-3


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the error over the norm of `wanted`, in float64; infinite for another shape and for a zero missed."""
    if found.shape != wanted.shape:
        return float("inf")
    error = float((found.double() - wanted.double()).norm())
    size = float(wanted.double().norm())
    return error / size if size else (0.0 if error == 0 else float("inf"))


def require(
    kernel: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], bounds: Mapping[str, float]
) -> None:
    """End the program, exit code 1 and one line, at the first tensor of `found` that is further from `wanted` than its
    bound."""
    for name, value in wanted.items():
        error = relative_error(found[name], value) if name in found else float("inf")
        # Written so that nan is refused too.
        if not error <= bounds[name]:
            raise SystemExit(f"{kernel}: {name}: relative error {error:.2e}, expected at most {bounds[name]:.2e}")


def results(call: Call, leaves: Tensors, outputs: Sequence[str], seed: int = 0) -> Tensors:
    """The outputs under the names `outputs`, and "d" + name: the gradient of every leaf, for gradients of the outputs
    that are random and the same in every dtype."""
    fresh = {name: value.detach().requires_grad_() for name, value in leaves.items()}
    made = list(call(fresh))
    source = torch.Generator(made[0].device).manual_seed(seed)
    above = []
    for value in made:
        drawn = torch.randn(value.shape, generator=source, device=value.device)
        above.append(drawn.bfloat16().to(value.dtype))  # exact in every dtype
    gradients = torch.autograd.grad(made, list(fresh.values()), above)
    named = {f"d{name}": gradient for name, gradient in zip(fresh, gradients, strict=True)}
    return {name: value.detach() for name, value in zip(outputs, made, strict=True)} | named


def agree(kernel: str, call: Call, reference: Call, leaves: Tensors, outputs: Sequence[str], bound: float) -> None:
    """Refuse `kernel` unless `call` on `leaves` agrees within `bound` with `reference` on them in float64."""
    wanted = results(reference, widened(leaves), outputs)
    require(kernel, results(call, leaves, outputs), wanted, dict.fromkeys(wanted, bound))


def widened(leaves: Tensors) -> Tensors:
    """The same values in float64."""
    return {name: value.double() for name, value in leaves.items()}
