"""Per-frame noise-level embeddings, with the residual that tells each tower the other's level (model reference 7).

Legend: B batch, F frames, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dualforce.model.layers import WideEmbeddingLinear, WideZeroLinear, sinusoid


def time_embedding(freq_dim: int, dim: int) -> nn.Sequential:
    """sinusoid [.., freq_dim] -> e [.., D], in fp32."""
    return nn.Sequential(WideEmbeddingLinear(freq_dim, dim), nn.SiLU(), WideEmbeddingLinear(dim, dim))


def time_projection(dim: int) -> nn.Sequential:
    """e [.., D] -> the six modulation rows [.., 6 D], in fp32."""
    return nn.Sequential(nn.SiLU(), WideEmbeddingLinear(dim, 6 * dim))


class DualSigma(nn.Module):
    """Residual on the modulation rows from both towers' noise levels; exactly zero at the start.

    Both levels share one sinusoid of `freq_dim`, half each, which gives the parameter counts of the model table.
    """

    def __init__(self, freq_dim: int, dim: int) -> None:
        super().__init__()
        self.hidden = WideEmbeddingLinear(freq_dim, dim)
        self.out = WideZeroLinear(dim, 6 * dim)
        self._half = freq_dim // 2

    def forward(self, own: Tensor, other: Tensor) -> Tensor:
        """Noise levels [B,F] of this and the other tower -> [B,F,6,D]."""
        both = torch.cat((sinusoid(own, self._half), sinusoid(other, self._half)), dim=-1)
        hidden = nn.functional.silu(self.hidden(both))
        return self.out(hidden).unflatten(-1, (6, -1))
