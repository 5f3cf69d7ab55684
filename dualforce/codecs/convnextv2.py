"""ConvNeXt V2 tiny (Woo et al. 2023, arXiv 2301.00808) with the heads of LivePortrait's motion extractor.

The modules carry the names of the published checkpoint, which a module of a library does not. Legend: N pictures, C
channels, H,W positions.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

DEPTHS = (3, 3, 9, 3)
WIDTHS = (96, 192, 384, 768)
KEYPOINTS = 21
BINS = 66  # of 3 degrees each
EPS = 1e-6


class MotionHeads(NamedTuple):
    """What the heads give, undecoded, fp32."""

    kp: Tensor  # [N,63] canonical keypoints x0 y0 z0 x1 ...
    pitch: Tensor  # [N,66] logits
    yaw: Tensor  # [N,66] logits
    roll: Tensor  # [N,66] logits
    t: Tensor  # [N,3]
    exp: Tensor  # [N,63] offsets of the keypoints
    scale: Tensor  # [N,1]


class MotionNetwork(nn.Module):
    """Pictures [N,3,256,256] fp32 in [0,1], RGB -> MotionHeads."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, WIDTHS[0], 4, stride=4), ChannelNorm(WIDTHS[0], eps=EPS))
        halvings = [nn.Sequential(ChannelNorm(a, eps=EPS), nn.Conv2d(a, b, 2, stride=2)) for a, b in pairwise(WIDTHS)]
        self.downsample_layers = nn.ModuleList([stem, *halvings])
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(width) for _ in range(depth))) for depth, width in zip(DEPTHS, WIDTHS, strict=True)
        )
        self.norm = nn.LayerNorm(WIDTHS[-1], eps=EPS)
        self.fc_kp = nn.Linear(WIDTHS[-1], 3 * KEYPOINTS)
        self.fc_scale = nn.Linear(WIDTHS[-1], 1)
        self.fc_pitch = nn.Linear(WIDTHS[-1], BINS)
        self.fc_yaw = nn.Linear(WIDTHS[-1], BINS)
        self.fc_roll = nn.Linear(WIDTHS[-1], BINS)
        self.fc_t = nn.Linear(WIDTHS[-1], 3)
        self.fc_exp = nn.Linear(WIDTHS[-1], 3 * KEYPOINTS)

    def forward(self, x: Tensor) -> MotionHeads:
        x = self.features(x)
        return MotionHeads(
            self.fc_kp(x), self.fc_pitch(x), self.fc_yaw(x), self.fc_roll(x), self.fc_t(x), self.fc_exp(x),
            self.fc_scale(x),
        )  # fmt: skip

    def features(self, x: Tensor) -> Tensor:
        """[N,768]: the mean over positions, normalised."""
        for halve, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(halve(x))
        return self.norm(x.mean(dim=(-2, -1)))


class Block(nn.Module):
    """Depthwise 7x7 convolution, then two linear layers per position with global response normalisation between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.pwconv1 = nn.Linear(width, 4 * width)
        self.grn = GlobalResponseNorm(4 * width)
        self.pwconv2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(self.grn(functional.gelu(self.pwconv1(y))))
        return x + y.permute(0, 3, 1, 2)


class GlobalResponseNorm(nn.Module):
    """x + gamma x n + beta on [N,H,W,C], n the L2 norm of a channel over positions in units of the channels' mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
        return x + self.gamma * (x * (norm / (norm.mean(dim=-1, keepdim=True) + EPS))) + self.beta


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over C of [N,C,H,W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
