"""The model: video tower, structure tower and bridge, in one forward for training, validation and generation.

Legend: B batch, F frames, C,H,W latent channels, height, width, P video tokens a frame, Q structure tokens, D width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dualforce.config import ModelConfig
from dualforce.model.audio import AudioAttention, AudioProjector, struct_slots, video_slots
from dualforce.model.bridge import BridgeLayer, BridgeRotary, bridge_layers
from dualforce.model.modulation import DualSigma
from dualforce.model.path import STRUCT, VIDEO, ChunkRule, Path
from dualforce.model.rope import Rotary, bridge_rotary, struct_rotary, video_rotary
from dualforce.model.tower import Tower, patchify, unpatchify
from dualforce.types import Conditioning, FrameSpan, Noised, Velocity
from megatron_ext.kernels.kernel_set import KernelSet


class _Positions(NamedTuple):
    video: Rotary
    struct: Rotary
    bridge: BridgeRotary


class DualTower(nn.Module):
    """Predicts the velocity of both streams from noised latents and conditions.

    `kernels` fixes the kernels and the dtype of the hidden states; predictions come back in fp32 (or wider).
    """

    def __init__(self, config: ModelConfig, kernels: KernelSet, checkpointing: bool = False) -> None:
        super().__init__()
        self.video = Tower(config.video, kernels, VIDEO)
        self.struct = Tower(config.struct, kernels, STRUCT)
        self.bridge = nn.ModuleDict({str(i): BridgeLayer(config, kernels, i) for i in bridge_layers(config)})
        self.dual_sigma_video = DualSigma(config.video.freq_dim, config.video.dim)
        self.dual_sigma_struct = DualSigma(config.struct.freq_dim, config.struct.dim)
        self.audio_projector = AudioProjector(config.audio)
        towers = (config.video, config.struct)
        self.audio_video, self.audio_struct = (
            nn.ModuleList(AudioAttention(t.dim, config.audio, t.eps, kernels) for _ in range(config.audio.layers))
            for t in towers
        )
        self.config = config
        self._dtype = kernels.dtype
        self._run = _recomputed if checkpointing else _called

    @property
    def rule(self) -> ChunkRule:
        """Which chunks see which."""
        return ChunkRule(self.config.frames_per_chunk, self.config.window, self.config.sink)

    def forward(self, noised: Noised, cond: Conditioning, span: FrameSpan, path: Path) -> Velocity:
        """Velocity of the frames of `span`; per-frame tensors hold just those frames, `path` finds the other keys."""
        sigma = noised.sigma
        rows_v, rows_s = self.video.embed_time(sigma.video), self.struct.embed_time(sigma.struct)
        mod_v = rows_v.t_mod + self.dual_sigma_video(sigma.video, sigma.struct)
        mod_s = rows_s.t_mod + self.dual_sigma_struct(sigma.struct, sigma.video)
        text = (cond.text * cond.text_keep[:, None, None]).to(self._dtype)
        text_v, text_s = self.video.embed_text(text), self.struct.embed_text(text)
        audio = self.audio_projector(cond.audio.to(self._dtype), cond.audio_keep)
        height, width = (size // self.config.video.patch for size in noised.video.shape[-2:])
        at = self._positions(span, height, width, sigma.video.device)
        slots = tuple(f(span, self.config.audio.context, audio.device) for f in (video_slots, struct_slots))
        known = self._with_reference(noised.video, cond, span)
        v = self.video.patch_embedding(patchify(known, self.config.video.patch))
        s = self.struct.patch_embedding(noised.struct.to(self._dtype))
        for layer, block in enumerate(self.video.blocks):
            if str(layer) in self.bridge:
                v, s = self._run(self.bridge[str(layer)], v, s, at.bridge, path)
            if layer < len(self.audio_video):
                v = self._run(self.audio_video[layer], v, audio, slots[0])
                s = self._run(self.audio_struct[layer], s, audio, slots[1])
            v = self._run(block, v, mod_v, text_v, at.video, path)
            if layer < len(self.struct.blocks):
                s = self._run(self.struct.blocks[layer], s, mod_s, text_s, at.struct, path)
        video = unpatchify(self.video.head(v, rows_v.e), self.config.video.patch, height, width)
        struct = self.struct.head(s, rows_s.e)
        return Velocity(video.to(sigma.video.dtype), struct.to(sigma.video.dtype))

    def _with_reference(self, video: Tensor, cond: Conditioning, span: FrameSpan) -> Tensor:
        """[noisy latent | mask | reference latent] on the channels: mask 1 and the reference in absolute frame 0, zeros
        elsewhere and where the reference is dropped (model reference 2.2, trap T32)."""
        batch, frames, _, height, width = video.shape
        mask_channels = self.config.video.in_dim - 2 * video.shape[2]
        known = cond.reference_keep.to(video.dtype)[:, None, None, None]
        first = torch.cat((known.expand(-1, mask_channels, height, width), known * cond.reference), dim=1)
        extra = first.new_zeros(batch, frames, *first.shape[1:])
        if span.start == 0:
            extra = torch.cat((first[:, None], extra[:, 1:]), dim=1)
        return torch.cat((video, extra), dim=2).to(self._dtype)

    def _positions(self, span: FrameSpan, height: int, width: int, device: torch.device) -> _Positions:
        video, struct = self.config.video.head_dim, self.config.struct.head_dim
        to_video, to_struct = (bridge_rotary(span, size, device, self._dtype) for size in (video, struct))
        return _Positions(
            video_rotary(span, height, width, video, device, self._dtype),
            struct_rotary(span, struct, device, self._dtype),
            BridgeRotary(to_video, to_struct),
        )


def _called(module: nn.Module, *args: Any) -> Any:
    return module(*args)


def _recomputed(module: nn.Module, *args: Any) -> Any:
    # Nothing in a block draws random numbers, so their state need not be kept.
    return checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False)
