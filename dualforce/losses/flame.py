"""FLAME alignment: the motion that the structure tower implies must map to the tracked FLAME parameters.

Legend: B batch, F frames, Q structure tokens, Cs motion width, Cf FLAME width (model reference 8.3).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class FlameSums(NamedTuple):
    """Local sums over items (clip, frame, slot)."""

    aligned: Tensor
    fitted: Tensor


class FlameHead(nn.Module):
    """Linear map from motion to FLAME, fitted on clean motion and applied, frozen, to the denoised motion."""

    def __init__(self, struct_dim: int, flame_dim: int) -> None:
        super().__init__()
        # Raw parameters, read in this forward only: under ZeRO-3 a child's weight is there in its own forward alone.
        self.weight = nn.Parameter(torch.empty(flame_dim, struct_dim))
        self.bias = nn.Parameter(torch.zeros(flame_dim))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, clean: Tensor, denoised: Tensor, flame: Tensor, sigma: Tensor, valid: Tensor) -> FlameSums:
        """clean and denoised [B,F,Q,Cs], flame [B,F,Q,Cf] standardised, sigma [B,F], valid [B,F,Q] bool.

        `aligned` sums (1 - sigma)^2 times the error of the denoised motion over noisy valid slots; the projection takes
        no gradient from it, or it would learn to forgive errors. `fitted` sums the error on clean motion.
        """
        weight, bias = self.weight.float(), self.bias.float()
        aligned = functional.linear(denoised.float(), weight.detach(), bias.detach()) - flame
        fitted = functional.linear(clean.float(), weight, bias) - flame
        trust = ((1 - sigma) ** 2 * (sigma > 0))[:, :, None] * valid
        return FlameSums((trust * aligned.pow(2).mean(-1)).sum(), (valid * fitted.pow(2).mean(-1)).sum())
