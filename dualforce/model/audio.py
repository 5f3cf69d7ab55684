"""Audio conditioning: every frame attends to its own short window of audio frames (model reference 7).

Legend: B batch, F frames, T tokens a frame, D tower width, A+2c audio frames of a window, W width of the projection.
The window reaches c frames (20 ms each) past the frame: that is the whole look-ahead.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualforce.config import AudioConfig
from dualforce.model.attention import HeadNorm, Heads
from dualforce.model.layers import XavierLinear, ZeroLinear
from dualforce.types import AUDIO_FRAMES, FrameSpan, struct_pixels
from megatron_ext.kernels.kernel_set import KernelSet


class AudioProjector(nn.Module):
    """Features -> width W, shared by both towers; a learned null token replaces dropped audio."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.mlp = nn.Sequential(
            XavierLinear(config.dim, config.width), nn.GELU(), XavierLinear(config.width, config.width)
        )
        self.null = nn.Parameter(torch.randn(config.width) / config.width**0.5)

    def forward(self, audio: Tensor, keep: Tensor) -> Tensor:
        """audio [B,F,A+2c,Ca], keep [B] bool -> [B,F,A+2c,W]."""
        return torch.where(keep[:, None, None, None], self.mlp(self.norm(audio)), self.null)


class AudioAttention(nn.Module):
    """Cross-attention of one tower's tokens to windows of projected audio; its output starts at zero (trap T1)."""

    def __init__(self, dim: int, config: AudioConfig, eps: float, kernels: KernelSet) -> None:
        super().__init__()
        inner = config.inner or dim
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.q = XavierLinear(dim, inner)
        self.kv = XavierLinear(config.width, 2 * inner)
        self.norm_q = HeadNorm(inner)
        self.norm_k = HeadNorm(inner)
        self.o = ZeroLinear(inner, dim)
        self._heads = Heads(kernels, config.heads, eps)

    def forward(self, x: Tensor, audio: Tensor, slots: Tensor) -> Tensor:
        """x [B,F,G*M,D] as G groups of M tokens, audio [B,F,A+2c,W], slots [F,G,S]: group g of frame f sees the audio
        frames slots[f,g] of its window. Returns what is to be added to x."""
        frame = torch.arange(slots.shape[0], device=x.device)[:, None, None]
        k, v = self._heads.split(self._heads.project(self.kv, audio), 2, (self.norm_k,), None)
        k, v = (t[:, frame, slots].flatten(0, 2) for t in (k, v))  # [B*F*G,S,N,K]
        kernels = self._heads.kernels
        normed = kernels.layer_norm(x, self.norm.weight, self.norm.bias, self.norm.eps)
        (q,) = self._heads.split(self._heads.project(self.q, normed), 1, (self.norm_q,), None)
        q = q.unflatten(2, (slots.shape[1], -1)).flatten(0, 2)
        out = kernels.attend(q, k, v).flatten(-2)
        return self._heads.project(self.o, out).view_as(x)


def video_slots(span: FrameSpan, context: int, device: torch.device) -> Tensor:
    """Every video token sees the whole window of its frame: [F,1,A+2c]."""
    return torch.arange(AUDIO_FRAMES + 2 * context, device=device).expand(span.length, 1, -1)


def struct_slots(span: FrameSpan, context: int, device: torch.device) -> Tensor:
    """The slot of pixel frame p sees audio frames 2p - c .. 2p + 1 + c, as places in its frame's window, which starts
    at 8j - 6 - c: [F,Q,2+2c]."""
    frame = torch.arange(span.start, span.stop, device="cpu")[:, None]
    first = 2 * struct_pixels(span) - AUDIO_FRAMES * frame + 6
    return (first[..., None] + torch.arange(2 + 2 * context, device="cpu")).to(device)
