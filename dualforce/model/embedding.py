"""What comes before the layers, and what comes after them.

Legend: B batch, F frames, C,H,W latent channels, height, width, P video tokens a frame, Q structure tokens, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dualforce.config import ModelConfig
from dualforce.model.audio import AudioProjector
from dualforce.model.block import Head
from dualforce.model.layer import LayerInputs
from dualforce.model.modulation import DualSigma
from dualforce.model.tower import TowerEmbedding, patchify, unpatchify
from dualforce.types import Conditioning, FrameSpan, Noised, Velocity
from megatron_ext.kernels.kernel_set import KernelSet


class Embedded(NamedTuple):
    """Flat, so that it can cross any module boundary."""

    video: Tensor  # [B,F,P,D_v]
    struct: Tensor  # [B,F,Q,D_s]
    video_e: Tensor  # [B,F,D_v] fp32, for the head
    struct_e: Tensor  # [B,F,D_s] fp32
    video_rows: Tensor  # from here on as in LayerInputs
    struct_rows: Tensor
    video_text: Tensor
    struct_text: Tensor
    audio: Tensor

    @property
    def shared(self) -> LayerInputs:
        """What every layer reads."""
        return LayerInputs(*self[4:])


class Embedding(nn.Module):
    """Model input and conditions -> what the layers read. Hidden states have `dtype`, modulation rows are fp32."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.video = TowerEmbedding(config.video)
        self.struct = TowerEmbedding(config.struct)
        self.dual_sigma_video = DualSigma(config.video.freq_dim, config.video.dim)
        self.dual_sigma_struct = DualSigma(config.struct.freq_dim, config.struct.dim)
        self.audio_projector = AudioProjector(config.audio)
        self._config, self._dtype = config, dtype

    def forward(self, noised: Noised, cond: Conditioning, span: FrameSpan) -> Embedded:
        """See Embedded; `span` says whether absolute frame 0, which the reference fills, is here."""
        sigma = noised.sigma
        rows_v, rows_s = self.video.embed_time(sigma.video), self.struct.embed_time(sigma.struct)
        text = (cond.text * cond.text_keep[:, None, None]).to(self._dtype)
        known = self._with_reference(noised.video, cond, span)
        return Embedded(
            video=self.video.patch_embedding(patchify(known, self._config.video.patch)),
            struct=self.struct.patch_embedding(noised.struct.to(self._dtype)),
            video_e=rows_v.e,
            struct_e=rows_s.e,
            video_rows=rows_v.t_mod + self.dual_sigma_video(sigma.video, sigma.struct),
            struct_rows=rows_s.t_mod + self.dual_sigma_struct(sigma.struct, sigma.video),
            video_text=self.video.embed_text(text),
            struct_text=self.struct.embed_text(text),
            audio=self.audio_projector(cond.audio.to(self._dtype), cond.audio_keep),
        )

    def _with_reference(self, video: Tensor, cond: Conditioning, span: FrameSpan) -> Tensor:
        """[noisy latent | mask | reference latent] on the channels: mask 1 and the reference in absolute frame 0, zeros
        elsewhere and where the reference is dropped (model reference 2.2, trap T32)."""
        batch, frames, _, height, width = video.shape
        mask_channels = self._config.video.in_dim - 2 * video.shape[2]
        known = cond.reference_keep.to(video.dtype)[:, None, None, None]
        first = torch.cat((known.expand(-1, mask_channels, height, width), known * cond.reference), dim=1)
        extra = first.new_zeros(batch, frames, *first.shape[1:])
        if span.start == 0:
            extra = torch.cat((first[:, None], extra[:, 1:]), dim=1)
        return torch.cat((video, extra), dim=2).to(self._dtype)


class Heads(nn.Module):
    """The heads of both towers."""

    def __init__(self, config: ModelConfig, kernels: KernelSet) -> None:
        super().__init__()
        self.video, self.struct = (
            Head(tower.dim, tower.out_dim * tower.patch**2, tower.eps, kernels)
            for tower in (config.video, config.struct)
        )
        self._patch = config.video.patch

    def forward(
        self, video: Tensor, struct: Tensor, video_e: Tensor, struct_e: Tensor, size: tuple[int, int]
    ) -> Velocity:
        """Tokens of both streams -> velocities, in the dtype of the levels; `size` in patches."""
        out = unpatchify(self.video(video, video_e), self._patch, *size)
        return Velocity(out.to(video_e.dtype), self.struct(struct, struct_e).to(struct_e.dtype))
