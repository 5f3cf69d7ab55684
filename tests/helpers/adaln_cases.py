"""Cases for a kernel of the AdaLN family against float64: the operations, their inputs and an exact result.

An operation takes the module under test and leaves by name (x, y [B,F,T,D]; table [B,F,6,D], whose rows are strided
views; weight, bias [D], expanded with zero strides) and gives a tuple of outputs. Gradients are those of the leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.kernels.adaln import reference

EPS = 1e-6
Leaves = dict[str, Tensor]
Results = dict[str, Tensor]


def _rows(leaves: Leaves) -> tuple[Tensor, ...]:
    """shift, scale, gate as a block takes them from its table."""
    return leaves["table"].unbind(2)[:3]


def _adaln(module: Any, leaves: Leaves) -> tuple[Tensor, ...]:
    shift, scale, _ = _rows(leaves)
    return (module.adaln(leaves["x"], shift, scale, EPS),)


def _gated(module: Any, leaves: Leaves) -> tuple[Tensor, ...]:
    return (module.gated_residual(leaves["x"], leaves["y"], _rows(leaves)[2]),)


def _pair(module: Any, leaves: Leaves) -> tuple[Tensor, ...]:
    shift, scale, gate = _rows(leaves)
    return module.adaln_residual(leaves["x"], leaves["y"], gate, shift, scale, EPS)


def _pair_without_gate(module: Any, leaves: Leaves) -> tuple[Tensor, ...]:
    shift, scale, _ = _rows(leaves)
    return module.adaln_residual(leaves["x"], leaves["y"], None, shift, scale, EPS)


def _alone(module: Any, leaves: Leaves) -> tuple[Tensor, ...]:
    shift, scale, _ = _rows(leaves)
    return module.adaln_residual(leaves["x"], None, None, shift, scale, EPS)


def _pair_with_one_row(module: Any, leaves: Leaves) -> tuple[Tensor, ...]:
    x = leaves["x"]
    weight, bias = (leaves[name].expand(*x.shape[:2], x.shape[3]) for name in ("weight", "bias"))
    return module.adaln_residual(x, leaves["y"], weight, bias, weight, EPS)


def _layer_norm(module: Any, leaves: Leaves) -> tuple[Tensor, ...]:
    return (module.layer_norm(leaves["x"], leaves["weight"], leaves["bias"], EPS),)


Op = Callable[[Any, Leaves], tuple[Tensor, ...]]
OPS: dict[str, tuple[Op, tuple[str, ...], tuple[str, ...]]] = {
    # name: operation, leaves, outputs
    "adaln": (_adaln, ("x", "table"), ("out",)),
    "gated": (_gated, ("x", "y", "table"), ("out",)),
    "pair": (_pair, ("x", "y", "table"), ("total", "out")),
    "pair-without-gate": (_pair_without_gate, ("x", "y", "table"), ("total", "out")),
    "alone": (_alone, ("x", "table"), ("total", "out")),
    "pair-with-one-row": (_pair_with_one_row, ("x", "y", "weight", "bias"), ("total", "out")),
    "layer-norm": (_layer_norm, ("x", "weight", "bias"), ("out",)),
}


def leaves_of(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    row_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Leaves, Leaves]:
    """(leaves, gradients of the outputs by name) for [B,F,T,D]; x has a mean, as residual streams have."""
    source = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=source, device=device)

    clips, frames, _, width = shape
    leaves = {"x": (2 * draw(*shape) + 1).to(dtype), "y": draw(*shape).to(dtype)}
    leaves |= {"table": draw(clips, frames, 6, width).to(row_dtype)}
    leaves |= {"weight": (draw(width) + 1).to(row_dtype), "bias": draw(width).to(row_dtype)}
    return leaves, {"total": draw(*shape).to(dtype), "out": draw(*shape).to(dtype)}


def run(module: Any, name: str, leaves: Leaves, above: Leaves, used: Sequence[str] = ("total", "out")) -> Results:
    """Outputs, and "d" + leaf: the gradient of every leaf when only the outputs in `used` have one."""
    op, names, outputs = OPS[name]
    fresh = {leaf: leaves[leaf].detach().requires_grad_() for leaf in names}
    results = dict(zip(outputs, op(module, fresh), strict=True))
    live = [output for output in outputs if output in used]
    grads = torch.autograd.grad(
        [results[output] for output in live],
        list(fresh.values()),
        [above[output].to(results[output].dtype) for output in live],
        allow_unused=True,
    )
    found = {output: value.detach() for output, value in results.items()}
    return found | {f"d{leaf}": grad for leaf, grad in zip(names, grads, strict=True) if grad is not None}


def exact(name: str, leaves: Leaves, above: Leaves, found: Results, used: Sequence[str] = ("total", "out")) -> Results:
    """The same in float64 by autograd. A pair normalises the sum as `found`, rounded to its dtype: the rounding is
    taken over as a constant, so what is left of an error belongs to the arithmetic of the norm and of its gradient."""

    def adaln_residual(
        x: Tensor, y: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        if y is None:
            return reference.adaln_residual(x, y, gate, shift, scale, eps)
        total = x + y if gate is None else reference.gated_residual(x, y, gate)
        stored = total + (found["total"].double() - total).detach()
        return total, reference.adaln(stored, shift, scale, eps)

    module = SimpleNamespace(
        adaln=reference.adaln,
        gated_residual=reference.gated_residual,
        layer_norm=reference.layer_norm,
        adaln_residual=adaln_residual,
    )
    wide = {leaf: value.double() for leaf, value in leaves.items()}
    return run(module, name, wide, {output: value.double() for output, value in above.items()}, used)


def rms_error(found: Tensor, wanted: Tensor) -> float:
    """RMS of the error over RMS of the value; a value of zero must be met exactly."""
    error = (found.double() - wanted).square().mean().sqrt().item()
    value = wanted.square().mean().sqrt().item()
    return error / value if value else (0.0 if error == 0 else float("inf"))


def assert_equal_bits(first: Results, second: Results) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs between two runs"


def poison_empty_tensors(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """torch.empty as seen by `module` gives NaN: an element that a kernel forgets shows."""

    class Poisoned:
        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

        @staticmethod
        def empty(*size: Any, **options: Any) -> Tensor:
            return torch.empty(*size, **options).fill_(float("nan"))

        @staticmethod
        def empty_like(like: Tensor, **options: Any) -> Tensor:
            return torch.empty_like(like, **options).fill_(float("nan"))

    monkeypatch.setattr(module, "torch", Poisoned())
