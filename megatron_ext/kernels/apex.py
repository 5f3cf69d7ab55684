"""NVIDIA apex, where that is installed: its affine LayerNorm and its Adam. Never a requirement.

The package index has another project of the name (a web toolkit of 2013), so the modules are looked for, not the name.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)


def fused_layer_norm() -> Callable[..., Tensor] | None:
    """apex's LayerNorm as layer_norm(x, weight, bias, eps) with fp32 statistics, or None."""
    found = _attribute("apex.normalization.fused_layer_norm", "fused_layer_norm_affine", "fused_layer_norm_cuda")
    if found is None:
        return None
    logger.info("kernels: affine LayerNorm is NVIDIA apex's")

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out: Tensor = found(x, weight, bias, x.shape[-1:], eps)
        return out

    return layer_norm


def fused_adam() -> Callable[..., Any] | None:
    """apex's FusedAdam, or None."""
    return _attribute("apex.optimizers", "FusedAdam", "amp_C")


def _attribute(module: str, name: str, extension: str) -> Any:
    """What `module` calls `name`, if its compiled part is there too: apex installs without, and fails later."""
    try:
        importlib.import_module(extension)
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
