"""One depth of the model: bridge, audio and a block of each tower. The module that training gathers as a whole.

Legend: B batch, F frames, P video tokens a frame, Q structure tokens, D width, E text tokens, A+2c audio frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from dualforce.config import ModelConfig
from dualforce.model.audio import AudioAttention
from dualforce.model.block import Block
from dualforce.model.bridge import BridgeLayer, BridgeRotary, bridge_layers
from dualforce.model.path import STRUCT, VIDEO, Path, Site
from dualforce.model.rope import Rotary
from megatron_ext.kernels.kernel_set import KernelSet


class LayerInputs(NamedTuple):
    """What every layer reads."""

    video_rows: Tensor  # [B,F,6,D_v] fp32
    struct_rows: Tensor  # [B,F,6,D_s] fp32
    video_text: Tensor  # [B,E,D_v]
    struct_text: Tensor  # [B,E,D_s]
    audio: Tensor  # [B,F,A+2c,W]


@dataclass(frozen=True)
class Positions:
    """Where the tokens of a span are: constants of its shape, without gradient (and so no tuple, whose tensors ZeRO-3's
    hooks would wrap one by one)."""

    size: tuple[int, int]  # height and width in patches
    video: Rotary
    struct: Rotary
    bridge: BridgeRotary
    video_slots: Tensor  # [F,1,A+2c] audio frames that a video token hears
    struct_slots: Tensor  # [F,Q,2+2c]


class DualLayer(nn.Module):
    """Bridge (both directions), audio, then the blocks; parts that a depth does not have have no weights."""

    def __init__(self, config: ModelConfig, kernels: KernelSet, index: int) -> None:
        super().__init__()
        self._bridged, self._hears = index in bridge_layers(config), index < config.audio.layers
        if self._bridged:
            self.bridge = BridgeLayer(config, kernels, index)
        if self._hears:
            self.audio_video = AudioAttention(config.video.dim, config.audio, config.video.eps, kernels)
            self.audio_struct = AudioAttention(config.struct.dim, config.audio, config.struct.eps, kernels)
        self.video = Block(config.video, kernels, Site(VIDEO, index))
        self._has_struct = index < config.struct.layers
        if self._has_struct:
            self.struct = Block(config.struct, kernels, Site(STRUCT, index))

    def forward(
        self, video: Tensor, struct: Tensor, inputs: LayerInputs, at: Positions, path: Path
    ) -> tuple[Tensor, Tensor]:
        """video [B,F,P,D_v], struct [B,F,Q,D_s] -> both, one layer on."""
        if self._bridged:
            video, struct = self.bridge(video, struct, at.bridge, path)
        heard = struct_heard = None
        if self._hears:
            heard = self.audio_video(video, inputs.audio, at.video_slots)
            struct_heard = self.audio_struct(struct, inputs.audio, at.struct_slots)
        rows, text = inputs.video_rows, inputs.video_text
        if not self._has_struct:
            return self.video(video, rows, text, at.video, path, heard), struct
        return path.both(
            lambda: self.video(video, rows, text, at.video, path, heard),
            lambda: self.struct(struct, inputs.struct_rows, inputs.struct_text, at.struct, path, struct_heard),
        )
