"""Small configurations, random weights and random inputs, shared by the tests of the model."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from dualforce.config import ModelConfig
from dualforce.model.dual_tower import DualTower
from dualforce.types import AUDIO_FRAMES, STRUCT_TOKENS, Conditioning, FrameSigma, Noised
from megatron_ext.kernels.kernel_set import KernelSet, select_kernels

ModuleT = TypeVar("ModuleT", bound=nn.Module)

TEXT_TOKENS = 3

_TOWER: dict[str, Any] = {"heads": 4, "ffn": 24, "text_dim": 8, "freq_dim": 16}
_BASE: dict[str, Any] = {
    "preset": "test",
    "video": {**_TOWER, "dim": 64, "layers": 3, "in_dim": 12, "out_dim": 4, "patch": 2},  # 4 noisy + 4 mask + 4 known
    "struct": {**_TOWER, "dim": 32, "layers": 3, "in_dim": 6, "out_dim": 6, "patch": 1},
    "bridge": {"layers": 2},
    "audio": {"dim": 5, "width": 12, "inner": 16, "heads": 4, "layers": 2, "context": 2},
    "frames_per_chunk": 2,
}


def tiny_config(**changes: Any) -> ModelConfig:
    """Two towers of three layers with 4 latent channels, struct_dim 6, audio_dim 5, text_dim 8; four heads everywhere.

    `changes` override fields of ModelConfig; a dict changes only the named fields of its section, so
    ``tiny_config(window=2, bridge={"layers": "full"}, video={"layers": 4})``.
    """
    values = {**_BASE, **changes}
    for name, value in changes.items():
        if isinstance(value, dict):
            values[name] = {**_BASE[name], **value}
    return ModelConfig.model_validate(values)


def kernels(dtype: torch.dtype = torch.float32) -> KernelSet:
    """Reference kernels on the CPU."""
    return select_kernels("reference", torch.device("cpu"), dtype)


def randomise(module: ModuleT, seed: int = 0) -> ModuleT:
    """Draw every parameter anew, in place and in the order of `parameters()`: zero-initialised heads, gates and output
    projections would make most comparisons pass for nothing. Activations stay of order 1."""
    source = torch.Generator("cpu").manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            plain = parameter.dim() < 2 or parameter.shape[0] == 1  # biases, norms, modulation rows
            scale = 0.5 if plain else (parameter.numel() / parameter.shape[0]) ** -0.5
            drawn = torch.randn(parameter.shape, generator=source, dtype=torch.float64) * scale
            parameter.copy_(drawn.to(parameter))
    return module


def tiny_model(config: ModelConfig | None = None, seed: int = 0, dtype: torch.dtype = torch.float32) -> DualTower:
    """A DualTower on the CPU with all parameters random."""
    return randomise(DualTower(config or tiny_config(), kernels(dtype)).to(dtype), seed)


def random_inputs(
    config: ModelConfig,
    batch: int = 1,
    frames: int = 5,
    height: int = 4,
    width: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Noised, Conditioning]:
    """Inputs of `frames` latent frames of height x width latents; every condition kept, all levels noisy."""
    source = torch.Generator("cpu").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64).to(dtype)

    def level() -> torch.Tensor:
        return (0.02 + 0.96 * torch.rand(batch, frames, generator=source, dtype=torch.float64)).to(dtype)

    channels = config.video.out_dim
    noised = Noised(
        video=normal(batch, frames, channels, height, width),
        struct=normal(batch, frames, STRUCT_TOKENS, config.struct.in_dim),
        sigma=FrameSigma(level(), level()),
    )
    kept = torch.ones(batch, dtype=torch.bool)
    cond = Conditioning(
        audio=normal(batch, frames, AUDIO_FRAMES + 2 * config.audio.context, config.audio.dim),
        audio_keep=kept,
        reference=normal(batch, channels, height, width),
        reference_keep=kept.clone(),
        text=normal(batch, TEXT_TOKENS, config.video.text_dim),
        text_keep=kept.clone(),
    )
    return noised, cond
