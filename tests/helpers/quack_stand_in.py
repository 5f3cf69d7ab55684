"""quack-kernels' interface in PyTorch, for machines without it: calls and their tiles are noted."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

MODULES = ("quack", "quack.gemm_interface", "quack.epilogue", "quack.epilogue.library", "quack.gemm_config")


def hide_quack(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were not installed."""
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)


def install_quack(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """-> the calls: name of the kernel, its configuration."""
    calls: list[tuple[str, Any]] = []

    def gemm_act(
        a: Tensor, b: Tensor, *, bias: Tensor | None, activation: str | None, config: Any, store_preact: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        calls.append((f"act {activation}", config))
        wide = a.float() @ b.float() + (0 if bias is None else bias.float())
        after = wide if activation is None else functional.gelu(wide, approximate="tanh")
        return (wide.to(a.dtype) if store_preact else None), after.to(a.dtype)

    def dgelu_dbias(a: Tensor, b: Tensor, c: Tensor, *, config: Any) -> dict[str, Tensor]:
        calls.append(("dact", config))
        hidden = c.float().requires_grad_()
        with torch.enable_grad():
            activation = functional.gelu(hidden, approximate="tanh")
        (by_hidden,) = torch.autograd.grad(activation, hidden, a.float() @ b.float())
        return {"D": by_hidden.to(a.dtype), "postact": activation.detach().to(a.dtype), "dbias": by_hidden.sum(0)[None]}

    contents: dict[str, dict[str, Any]] = {
        "quack.gemm_interface": {"gemm_act": gemm_act},
        "quack.epilogue.library": {"dgelu_dbias_mod": dgelu_dbias},
        "quack.gemm_config": {"GemmConfig": SimpleNamespace},
    }
    for name in MODULES:
        module = ModuleType(name)
        for key, value in contents.get(name, {}).items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)
    return calls
