"""Face motion by LivePortrait's motion extractor (Guo et al. 2024, arXiv 2407.03168; MIT licence), from its checkpoint
`motion_extractor.pth`, which is given by path and never downloaded.

LivePortrait crops to 2.3 times the box of its landmarks, which lie lower than the forehead; a crop of ours, twice the
box from forehead to chin, shows about the same. It is used as it is: nothing is rotated.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dualforce.codecs.checkpoint_file import fill, named, read_checkpoint
from dualforce.codecs.convnextv2 import BINS, KEYPOINTS, MotionHeads, MotionNetwork
from dualforce.codecs.face_box import resize
from dualforce.codecs.protocols import CodecError, Pixels

KIND = "liveportrait"
VERSION = "v1"
EDGE = 256
PREFIX = "detector."
BIN_DEGREES, LOWEST_DEGREES = 3.0, -97.5

NAMES = (
    *(f"exp{point:02d}{axis}" for point in range(KEYPOINTS) for axis in "xyz"),
    "scale", "tx", "ty", "tz", "pitch", "yaw", "roll",
)  # fmt: skip


class LivePortraitMotion:
    """Motion [P,70] fp32: offsets of 21 keypoints by expression (x, y, z each), scale, translation x, y, z, and pitch,
    yaw, roll in degrees. The canonical keypoints, which tell faces apart and not their motion, are left out.

    The network gives numbers for any picture: that there is a face must be known before.
    """

    names = NAMES
    width = len(NAMES)

    def __init__(self, checkpoint: Path, device: str = "cpu", batch: int = 16) -> None:
        """`batch`: pictures at a time. Raises CodecError for a file without the published keys and shapes."""
        found = read_checkpoint(checkpoint)
        tensors = found.below(PREFIX)
        if len(tensors) < len(found.tensors):
            raise CodecError(
                f"{checkpoint}: keys {named(found.tensors)}: expected LivePortrait's motion extractor, all below "
                f"{PREFIX!r}"
            )
        with torch.device("meta"):
            network = MotionNetwork()
        fill(network, tensors, checkpoint, PREFIX)
        self._device, self._batch = torch.device(device), batch
        self._network = network.to(self._device)
        self.tag = f"{KIND}-{self.width}-{found.digest}-{VERSION}"

    @torch.inference_mode()
    def encode(self, pixels: Pixels, fps: float) -> Tensor:
        """Motion, on the CPU, of square face crops [P,H,H,3] uint8, best of 256 pixels or more; each stands alone,
        whatever `fps` is. Raises ValueError for another shape."""
        if pixels.ndim != 4 or not len(pixels) or pixels.shape[1] != pixels.shape[2] or pixels.shape[3] != 3:
            raise ValueError(f"pixels of shape {pixels.shape}: expected [P,H,H,3] with P > 0")
        rows = [self._rows(pixels[start : start + self._batch]) for start in range(0, len(pixels), self._batch)]
        return torch.cat(rows).cpu()

    def _rows(self, pixels: Pixels) -> Tensor:
        small = torch.from_numpy(np.stack([resize(picture, EDGE) for picture in pixels])).to(self._device)
        return decoded(self._network(small.permute(0, 3, 1, 2).float() / 255))


def decoded(heads: MotionHeads) -> Tensor:
    """Rows [N,70] in the order of NAMES."""
    angles = [degrees(logits)[:, None] for logits in (heads.pitch, heads.yaw, heads.roll)]
    return torch.cat([heads.exp, heads.scale, heads.t, *angles], dim=1)


def degrees(logits: Tensor) -> Tensor:
    """Angle [N] in degrees, -97.5 to 97.5, of bins [N,66]: the mean of 3 i - 97.5 under their softmax."""
    bins = torch.arange(BINS, dtype=logits.dtype, device=logits.device) * BIN_DEGREES + LOWEST_DEGREES
    return logits.softmax(dim=1) @ bins
