"""ResNet-50 (He et al. 2015, arXiv 1512.03385) up to its pooled features, stride in the 3x3 convolution.

The modules carry torchvision's names, which published checkpoints use. Legend: N pictures, C channels, H,W positions.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

FEATURES = 2048
BLOCKS = (3, 4, 6, 3)
GROWTH = 4  # channels of a block's output over those inside


class ResNet50(nn.Module):
    """Pictures [N,3,H,W] fp32 -> [N,2048], the mean over positions of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _layer(64, 64, BLOCKS[0], stride=1)
        self.layer2 = _layer(256, 128, BLOCKS[1], stride=2)
        self.layer3 = _layer(512, 256, BLOCKS[2], stride=2)
        self.layer4 = _layer(1024, 512, BLOCKS[3], stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return x.mean(dim=(-2, -1))


class Bottleneck(nn.Module):
    """1x1, 3x3 (strided) and 1x1 convolutions beside a short cut."""

    def __init__(self, width: int, inner: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, GROWTH * inner, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(GROWTH * inner)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or width != GROWTH * inner:
            self.downsample = nn.Sequential(
                nn.Conv2d(width, GROWTH * inner, 1, stride=stride, bias=False), nn.BatchNorm2d(GROWTH * inner)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(y)))
        return functional.relu(self.bn3(self.conv3(y)) + self.downsample(x))


def _layer(width: int, inner: int, blocks: int, stride: int) -> nn.Sequential:
    rest = (Bottleneck(GROWTH * inner, inner, 1) for _ in range(blocks - 1))
    return nn.Sequential(Bottleneck(width, inner, stride), *rest)
