"""The model: video tower, structure tower and bridge, in one forward for training, validation and generation.

Legend: B batch, F frames, C,H,W latent channels, height, width, P video tokens a frame, Q structure tokens, D width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from dualforce.config import ModelConfig
from dualforce.model.audio import struct_slots, video_slots
from dualforce.model.bridge import BridgeRotary
from dualforce.model.embedding import Embedded, Embedding, Heads
from dualforce.model.layer import DualLayer, Positions
from dualforce.model.path import ChunkRule, Path
from dualforce.model.placement import Place, in_place
from dualforce.model.rope import bridge_rotary, struct_rotary, video_rotary
from dualforce.types import Conditioning, FrameSpan, Noised, Velocity
from megatron_ext.kernels.kernel_set import KernelSet

KNOWN_SPANS = 64  # spans whose positions are kept; generation meets a new one for every chunk


class DualTower(nn.Module):
    """Predicts the velocity of both streams from noised latents and conditions.

    `kernels` fixes the kernels and the dtype of the hidden states; predictions come back in fp32 (or wider). `place`
    decides where and how each part is held: the embedding, every layer, the heads.
    """

    def __init__(self, config: ModelConfig, kernels: KernelSet, place: Place = in_place) -> None:
        super().__init__()
        self.embedding = place(partial(Embedding, config, kernels.dtype))
        self.layers = nn.ModuleList(
            place(partial(DualLayer, config, kernels, index)) for index in range(config.video.layers)
        )
        self.ends = place(partial(Heads, config, kernels))
        self.config, self.kernels = config, kernels
        self._dtype = kernels.dtype
        self._known_positions: dict[tuple[FrameSpan, int, int, torch.device], Positions] = {}

    @property
    def rule(self) -> ChunkRule:
        """Which chunks see which."""
        return ChunkRule(self.config.frames_per_chunk, self.config.window, self.config.sink)

    def forward(self, noised: Noised, cond: Conditioning, span: FrameSpan, path: Path) -> Velocity:
        """Velocity of the frames of `span`; per-frame tensors hold just those frames, `path` finds the other keys."""
        height, width = (size // self.config.video.patch for size in noised.video.shape[-2:])
        at = self._positions(span, height, width, noised.video.device)
        embedded = Embedded(*self.embedding(noised, cond, span))
        video, struct, inputs = embedded.video, embedded.struct, embedded.shared
        for layer in self.layers:
            video, struct = layer(video, struct, inputs, at, path)
        return Velocity(*self.ends(video, struct, embedded.video_e, embedded.struct_e, at.size))

    def _positions(self, span: FrameSpan, height: int, width: int, device: torch.device) -> Positions:
        """Made once for a span: the same objects in every step of training on clips of one length."""
        key = (span, height, width, device)
        if key not in self._known_positions:
            if len(self._known_positions) >= KNOWN_SPANS:
                del self._known_positions[next(iter(self._known_positions))]
            self._known_positions[key] = self._new_positions(*key)
        return self._known_positions[key]

    def _new_positions(self, span: FrameSpan, height: int, width: int, device: torch.device) -> Positions:
        video, struct = self.config.video.head_dim, self.config.struct.head_dim
        to_video, to_struct = (bridge_rotary(span, size, device, self._dtype) for size in (video, struct))
        return Positions(
            size=(height, width),
            video=video_rotary(span, height, width, video, device, self._dtype),
            struct=struct_rotary(span, struct, device, self._dtype),
            bridge=BridgeRotary(to_video, to_struct),
            video_slots=video_slots(span, self.config.audio.context, device),
            struct_slots=struct_slots(span, self.config.audio.context, device),
        )
