"""The bridge: at chosen layers each tower attends to the other, both from the states before the update (4.3).

Legend: B batch, F frames, P video tokens a frame, Q structure tokens, D_v and D_s widths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dualforce.config import ConfigError, ModelConfig
from dualforce.model.attention import BridgeAttention
from dualforce.model.path import STRUCT_TO_VIDEO, VIDEO_TO_STRUCT, Path, Site
from dualforce.model.rope import Rotary
from megatron_ext.kernels.kernel_set import KernelSet

CUSTOM_LAYERS = (0, 2, 4, 6, 8, 12, 16, 20)


def bridge_layers(config: ModelConfig) -> tuple[int, ...]:
    """Layers that have a bridge, in order (model reference 4.2); ConfigError for a layer that one tower lacks."""
    if config.bridge.directions == "none":
        return ()
    depth, choice = config.struct.layers, config.bridge.layers
    if isinstance(choice, str):
        return tuple(i for i in range(depth) if _in_strategy(choice, i, depth))
    layers = tuple(range(choice)) if isinstance(choice, int) else tuple(sorted(set(choice)))
    if not layers or layers[0] < 0 or layers[-1] >= depth:
        raise ConfigError(f"bridge.layers = {choice}: expected layers among the {depth} that both towers have")
    return layers


def _in_strategy(name: str, layer: int, depth: int) -> bool:
    rules = {
        "shallow_focus": layer < max(1, min(10, depth // 3)),  # a tower of two layers still gets one bridge
        "distributed": layer % 3 == 0,
        "progressive": layer < 8 or (layer - 8) % 3 == 0,
        "custom": layer in CUSTOM_LAYERS,
        "full": True,
    }
    return rules[name]


class BridgeRotary(NamedTuple):
    """Positions of both streams for each direction; the two directions may differ in head size."""

    to_video: tuple[Rotary, Rotary]  # video queries, struct keys
    to_struct: tuple[Rotary, Rotary]  # video keys, struct queries


class Conditioner(nn.Module):
    """One direction at one layer: the conditioning stream is normalised, the query stream is not."""

    def __init__(self, config: ModelConfig, kernels: KernelSet, site: Site) -> None:
        super().__init__()
        towers = (config.video, config.struct)
        own, other = towers if site.stream == STRUCT_TO_VIDEO else towers[::-1]
        self.y_norm = nn.LayerNorm(other.dim, eps=own.eps)
        self.inner = BridgeAttention(own.dim, other.dim, own.heads, own.eps, kernels, site, config.bridge.zero_init)
        self._scale, self._kernels = config.bridge.scale, kernels

    def forward(self, x: Tensor, other: Tensor, x_rotary: Rotary, other_rotary: Rotary, path: Path) -> Tensor:
        """x [B,F,Tx,D], other [B,F,Ty,D'] -> the updated x."""
        normed = self._kernels.layer_norm(other, self.y_norm.weight, self.y_norm.bias, self.y_norm.eps)
        return torch.add(x, self.inner(x, normed, x_rotary, other_rotary, path), alpha=self._scale)


class BridgeLayer(nn.Module):
    """Both directions at one layer; a direction that the run leaves out has no weights."""

    def __init__(self, config: ModelConfig, kernels: KernelSet, layer: int) -> None:
        super().__init__()
        directions = config.bridge.directions
        self._to_video, self._to_struct = directions in ("both", "s2v"), directions in ("both", "v2s")
        if self._to_video:
            self.struct_to_video = Conditioner(config, kernels, Site(STRUCT_TO_VIDEO, layer))
        if self._to_struct:
            self.video_to_struct = Conditioner(config, kernels, Site(VIDEO_TO_STRUCT, layer))

    def forward(self, video: Tensor, struct: Tensor, rotary: BridgeRotary, path: Path) -> tuple[Tensor, Tensor]:
        """video [B,F,P,D_v], struct [B,F,Q,D_s] -> both, updated from the states that came in."""
        new_video, new_struct = video, struct
        if self._to_video:
            new_video = self.struct_to_video(video, struct, *rotary.to_video, path)
        if self._to_struct:
            video_rotary, struct_rotary = rotary.to_struct
            new_struct = self.video_to_struct(struct, video, struct_rotary, video_rotary, path)
        return new_video, new_struct
