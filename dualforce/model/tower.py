"""The ends of a tower: embeddings and head (model reference 2 and 3). Its blocks are in the layers of the model.

Legend: B batch, F frames, T tokens a frame, D width. Submodules carry Wan's names.
"""

from __future__ import annotations

from typing import NamedTuple

from einops import rearrange
from torch import Tensor, nn

from dualforce.config import TowerConfig
from dualforce.model.layers import EmbeddingLinear, XavierLinear, sinusoid
from dualforce.model.modulation import time_embedding, time_projection


class TimeRows(NamedTuple):
    """e [B,F,D] for the head and t_mod [B,F,6,D] for the blocks, fp32."""

    e: Tensor
    t_mod: Tensor


class TowerEmbedding(nn.Module):
    """Tokens, noise levels and text of one tower on their way to width D."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.patch_embedding = XavierLinear(config.in_dim * config.patch**2, config.dim)
        if config.text:
            self.text_embedding = nn.Sequential(
                EmbeddingLinear(config.text_dim, config.dim),
                nn.GELU(approximate="tanh"),
                EmbeddingLinear(config.dim, config.dim),
            )
        self.time_embedding = time_embedding(config.freq_dim, config.dim)
        self.time_projection = time_projection(config.dim)
        self.config = config

    def embed_time(self, sigma: Tensor) -> TimeRows:
        """Noise levels [B,F] -> modulation rows."""
        e = self.time_embedding(sinusoid(sigma, self.config.freq_dim))
        return TimeRows(e, self.time_projection(e).unflatten(-1, (6, -1)))

    def embed_text(self, text: Tensor) -> Tensor:
        """[B,E,Ct] -> [B,E,D]; without text attention the input is returned and never read."""
        return self.text_embedding(text) if self.config.text else text


def patchify(x: Tensor, patch: int) -> Tensor:
    """[B,F,C,H,W] -> tokens [B,F,(H/p)(W/p),C*p*p], row-major, in the order of a convolution's weight."""
    return rearrange(x, "b f c (h p) (w q) -> b f (h w) (c p q)", p=patch, q=patch)


def unpatchify(x: Tensor, patch: int, height: int, width: int) -> Tensor:
    """Tokens [B,F,h*w,p*p*C], channel fastest -> [B,F,C,h*p,w*p]."""
    return rearrange(x, "b f (h w) (p q c) -> b f c (h p) (w q)", p=patch, q=patch, h=height, w=width)
