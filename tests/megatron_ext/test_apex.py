"""apex is found by what it has, never by its name; these stand-ins have apex's signatures."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from dualforce.train.engine import apex_adam
from megatron_ext.kernels.apex import fused_adam, fused_layer_norm

PARAMS = {"lr": 1e-4, "betas": [0.9, 0.95], "torch_adam": True, "fused": True}
CONFIG = {"optimizer": {"type": "AdamW", "params": PARAMS}}


def install(monkeypatch: pytest.MonkeyPatch, **modules: dict[str, Any]) -> None:
    """Put packages of these names and contents in the place of what is installed."""
    parts = ("apex", "apex.optimizers", "apex.normalization", "apex.normalization.fused_layer_norm")
    for name in (*parts, "amp_C", "fused_layer_norm_cuda"):
        module = ModuleType(name)
        module.__path__ = []  # a package
        vars(module).update(modules.get(name.rpartition(".")[2], {}))
        monkeypatch.setitem(sys.modules, name, module)


def test_without_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)  # import raises ImportError
    assert fused_adam() is None and fused_layer_norm() is None
    assert apex_adam([], CONFIG) is None


def test_the_other_project_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    assert fused_adam() is None and fused_layer_norm() is None


def test_apex_without_its_compiled_part(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, optimizers={"FusedAdam": print}, fused_layer_norm={"fused_layer_norm_affine": print})
    for name in ("amp_C", "fused_layer_norm_cuda"):
        monkeypatch.delitem(sys.modules, name)
    assert fused_adam() is None and fused_layer_norm() is None


def test_nvidia_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def adam(groups: Any, **options: Any) -> str:
        seen.update(options, groups=groups)
        return "adam"

    def affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, shape: Any, eps: float) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, shape, weight, bias, eps)

    install(monkeypatch, optimizers={"FusedAdam": adam}, fused_layer_norm={"fused_layer_norm_affine": affine})
    assert apex_adam(["g"], CONFIG) == "adam"  # type: ignore[list-item]
    assert seen == {"groups": ["g"], "adam_w_mode": True, "lr": 1e-4, "betas": [0.9, 0.95]}
    assert apex_adam([], {"optimizer": {"type": "SGD"}}) is None
    assert apex_adam([], CONFIG | {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}) is None
    norm, x = fused_layer_norm(), torch.randn(2, 3, 8)
    assert norm is not None
    weight, bias = torch.rand(8), torch.rand(8)
    assert torch.equal(norm(x, weight, bias, 1e-6), torch.nn.functional.layer_norm(x, (8,), weight, bias, 1e-6))
