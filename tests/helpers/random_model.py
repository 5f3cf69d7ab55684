"""Small models whose every parameter is random: with zero-initialised leaves most comparisons pass for nothing."""

from __future__ import annotations

import torch

from dualforce.config import ModelConfig, ModelOverrides
from dualforce.model.dual_tower import DualTower
from dualforce.presets import build_model_config
from megatron_ext.kernels.kernel_set import KernelSet, select_kernels


def reference_kernels() -> KernelSet:
    """Reference kernels, CPU, fp32."""
    return select_kernels("reference", torch.device("cpu"), torch.float32)


def random_model(
    struct_dim: int = 6,
    audio_dim: int = 5,
    overrides: ModelOverrides | None = None,
    config: ModelConfig | None = None,
    seed: int = 0,
) -> DualTower:
    """Preset tiny (or `config`) in fp32 on the CPU with all parameters drawn anew; outputs are of order 1."""
    made = config or build_model_config("tiny", struct_dim=struct_dim, audio_dim=audio_dim, overrides=overrides)
    model = DualTower(made, reference_kernels())
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=source) * scale)
    return model.eval().requires_grad_(False)
