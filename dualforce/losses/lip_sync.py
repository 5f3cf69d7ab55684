"""Lip sync: the mouth of a denoised frame must match its own sound among the sounds of the same clip (InfoNCE, van den
Oord et al. 2018, arXiv 1807.03748, eq. 4, both ways; model reference 8.4).

Legend: B batch, F frames of the clip, _loc this rank's frames, C,H,W latent channels, height, width, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dualforce.config import LipSyncConfig

POOLED = (4, 6)  # rows and columns of the pooled mouth crop


class LipSums(NamedTuple):
    """Local sums: the loss, how many rows name their own partner first (mean of both ways), and the rows."""

    loss: Tensor
    hits: Tensor
    rows: Tensor


def lip_items(sigma: Tensor, voiced: Tensor, valid: Tensor, max_sigma: float) -> Tensor:
    """Frames that take part, [B,F] bool: real, voiced and not too noisy to have a mouth."""
    return voiced & valid & (sigma <= max_sigma)


def lip_rows(items: Tensor) -> Tensor:
    """Taking part and with a negative at least two frames away in the same clip, [B,F] bool."""
    return items & (_negatives(items).any(-1))


def _negatives(items: Tensor) -> Tensor:
    frame = torch.arange(items.shape[1], device=items.device)
    far = (frame[:, None] - frame[None, :]).abs() >= 2
    return far & items[:, None, :]


class LipSyncHead(nn.Module):
    """Mouth and sound encoders with a learned temperature."""

    def __init__(self, channels: int, audio_dim: int, config: LipSyncConfig) -> None:
        super().__init__()
        self.mouth = _mlp(channels * POOLED[0] * POOLED[1], config.dim)
        self.sound = nn.Sequential(
            nn.Conv1d(audio_dim, config.dim, 3, padding=1),
            nn.GELU(),
            nn.Conv1d(config.dim, config.dim, 3, stride=2, padding=1),
            nn.GELU(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(config.dim, config.dim),
        )
        self.log_tau = nn.Parameter(torch.tensor([math.log(config.tau)]))
        self._config = config

    def forward(
        self, denoised: Tensor, audio: Tensor, sigma: Tensor, items: Tensor, start: int,
        gather: Callable[[Tensor], Tensor],
    ) -> LipSums:  # fmt: skip
        """denoised [B,F_loc,C,H,W], audio windows [B,F_loc,A+2c,Ca], sigma [B,F_loc], items [B,F] of the whole clip,
        `start` the place of the first local frame, `gather` [B,F_loc,..] -> [B,F,..] -> sums over the local rows."""
        own = slice(start, start + denoised.shape[1])
        mouth, sound = self._mouth(denoised), self._sound(audio)
        all_mouth, all_sound = gather(torch.cat((mouth, sound), dim=-1)).chunk(2, dim=-1)
        rows = lip_rows(items)[:, own]
        candidates = _negatives(items)[:, own] | _diagonal(items)[:, own]
        scale = torch.exp(-self.log_tau.float()).clamp_max(100.0)  # tau >= 0.01
        label = torch.arange(items.shape[1], device=items.device)[own].expand(items.shape[0], -1)
        loss, hits = denoised.new_zeros(()), denoised.new_zeros(())
        for query, keys in ((mouth, all_sound), (sound, all_mouth)):
            logits = (query @ keys.transpose(1, 2) * scale).masked_fill(~candidates, -1e4)
            each = functional.cross_entropy(logits.flatten(0, 1), label.flatten(), reduction="none").view_as(sigma)
            loss = loss + 0.5 * (each * (1 - sigma) * rows).sum()
            hits = hits + 0.5 * ((logits.argmax(-1) == label) & rows).sum()
        return LipSums(loss, hits, rows.sum())

    def _mouth(self, latent: Tensor) -> Tensor:
        height, width = latent.shape[-2:]
        (top, bottom), (left, right) = self._config.rows, self._config.cols
        rows = slice(math.floor(top * height), math.ceil(bottom * height))
        cols = slice(math.floor(left * width), math.ceil(right * width))
        crop = latent[..., rows, cols]
        pooled = functional.adaptive_avg_pool2d(crop.flatten(0, 1), POOLED).flatten(1)
        return _unit(self.mouth(pooled.to(self._dtype())), latent)

    def _sound(self, audio: Tensor) -> Tensor:
        return _unit(self.sound(audio.flatten(0, 1).transpose(1, 2).to(self._dtype())), audio)

    def _dtype(self) -> torch.dtype:
        return self.log_tau.dtype


def _mlp(inputs: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, dim), nn.GELU(), nn.Linear(dim, dim))


def _unit(x: Tensor, like: Tensor) -> Tensor:
    """[B*F,D] -> unit vectors [B,F,D] in fp32."""
    return functional.normalize(x.float(), dim=-1).unflatten(0, like.shape[:2])


def _diagonal(items: Tensor) -> Tensor:
    return torch.eye(items.shape[1], dtype=torch.bool, device=items.device).expand(items.shape[0], -1, -1)
