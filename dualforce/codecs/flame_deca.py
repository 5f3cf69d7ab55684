"""FLAME parameters by the coarse encoders of DECA (Feng et al. 2021, arXiv 2012.04012) and EMOCA (Danecek et al. 2022,
arXiv 2204.11312), from their checkpoints. These and FLAME itself are for non-commercial use after registration: they
are given by path and never downloaded.

What is assumed of the files (their authors' code is the source; the files themselves were not at hand):

- DECA, `deca_model.tar`: objects `E_flame`, `E_detail`, `D_detail` of tensors; `E_flame` is `encoder.*`, a ResNet-50
  with torchvision's names, and `layers.0`, `layers.2`, linear 2048 -> 1024 -> 236 with a ReLU between.
- The 236 numbers are shape 100, texture 50, expression 50, pose 6 (rotation of the head, then of the jaw, both
  axis-angle in radians), camera 3, light 27.
- EMOCA: the same below `deca.`, in a `state_dict` or not, and `E_expression` built like `E_flame`. Its first 50 numbers
  replace the expression, and what it gives beyond those the end of the pose: 53 the jaw, as released; 56 all of it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualforce.codecs.checkpoint_file import Checkpoint, fill, named, read_checkpoint
from dualforce.codecs.face_box import Boxes, square_crop
from dualforce.codecs.protocols import CodecError, Flame, Pixels
from dualforce.codecs.resnet50 import FEATURES, ResNet50

KINDS = ("deca", "emoca")
VERSION = "v1"
EDGE = 224
HIDDEN = 1024
ROOTS = ("", "deca.", "state_dict.", "state_dict.deca.")  # what stands before E_flame
WIDTHS = {"shape": 100, "tex": 50, "exp": 50, "pose": 6, "cam": 3, "light": 27}
CODE = sum(WIDTHS.values())
EXPRESSION_CODES = (50, 53, 56)

# Of a face box from forehead to chin, the share above the brows: medians of 0.11 to 0.20 over eight talking heads.
BROW = 0.14
MARGIN = 1.1 * 1.25  # DECA's crop over the mean edge of the box from brows to chin

NAMES = (
    *(f"exp{i:02d}" for i in range(WIDTHS["exp"])),
    *(f"{part}_{axis}" for part in ("jaw", "rot") for axis in "xyz"),
)


class DecaFlame:
    """FLAME parameters by DECA or EMOCA, whichever the checkpoint holds; the tag names it with its weights.

    56 numbers: expression 50, jaw 3, rotation of the head 3 (axis-angle, radians).
    """

    names = NAMES
    width = len(NAMES)

    def __init__(self, checkpoint: Path, device: str = "cpu", batch: int = 16) -> None:
        """`batch`: pictures at a time. Raises CodecError for a file of another layout."""
        found = read_checkpoint(checkpoint)
        root = next((root for root in ROOTS if found.below(f"{root}E_flame.")), None)
        if root is None:
            raise CodecError(
                f"{checkpoint}: keys {named(found.tensors)}: expected DECA's or EMOCA's, with E_flame.encoder.* and "
                "E_flame.layers.*"
            )
        self._device, self._batch = torch.device(device), batch
        self._coarse = _encoder(found, f"{root}E_flame.", CODE).to(self._device)
        prefix = f"{root}E_expression."
        extra = bool(found.below(prefix))
        self._expression = _encoder(found, prefix, _codes(found, prefix)).to(self._device) if extra else None
        self.tag = f"{KINDS[extra]}-{self.width}-{found.digest}-{VERSION}"

    @torch.inference_mode()
    def encode(self, pixels: Pixels, boxes: Boxes) -> Flame:
        """Flame, on the CPU, of pictures [P,H,W,3] uint8 with the face in `boxes` [P,4] (forehead to chin, in pixels of
        the picture). A frame is invalid where its box is NaN or the network gives NaN or infinity.

        DECA's own crop, cut out with antialiasing, edge pixels repeated outside (DECA: black). ValueError for a box
        without area or another number of boxes.
        """
        if len(pixels) != len(boxes) or not len(pixels):
            raise ValueError(f"{len(pixels)} pictures, {len(boxes)} boxes: expected equal numbers of at least 1")
        values = torch.zeros(len(pixels), self.width)
        seen = np.flatnonzero(np.isfinite(boxes).all(axis=1))
        squares = deca_squares(boxes[seen])
        for start in range(0, len(seen), self._batch):
            part = slice(start, start + self._batch)
            crops = [square_crop(pixels[i], square, EDGE) for i, square in zip(seen[part], squares[part], strict=True)]
            values[seen[part]] = self._rows(np.stack(crops)).cpu()
        valid = torch.zeros(len(pixels), dtype=torch.bool)
        valid[seen] = torch.isfinite(values[seen]).all(dim=1)
        return Flame(torch.where(valid[:, None], values, 0.0), valid)

    def _rows(self, crops: Pixels) -> Tensor:
        pictures = torch.from_numpy(crops).to(self._device).permute(0, 3, 1, 2).float() / 255
        code = dict(zip(WIDTHS, self._coarse(pictures).split(list(WIDTHS.values()), dim=1), strict=True))
        exp, pose = code["exp"], code["pose"]
        if self._expression is not None:
            exp, more = self._expression(pictures).tensor_split([WIDTHS["exp"]], dim=1)
            pose = torch.cat([pose[:, : WIDTHS["pose"] - more.shape[1]], more], dim=1)
        rotation, jaw = pose.chunk(2, dim=1)
        return torch.cat([exp, jaw, rotation], dim=1)


class CodeEncoder(nn.Module):
    """Pictures [N,3,224,224] fp32 in [0,1], RGB -> codes [N,`codes`]."""

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.encoder = ResNet50()
        self.layers = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, codes))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(self.encoder(x))
        return found


def deca_squares(boxes: Boxes) -> NDArray[np.float64]:
    """Squares [N,3] that DECA crops, for faces in boxes [N,4] from forehead to chin.

    DECA takes the box around 68 landmarks, brows to chin, and around its centre 1.1 x 1.25 times its mean edge.
    """
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    top = boxes[:, 1] + BROW * height
    side = MARGIN * (width + boxes[:, 3] - top) / 2
    return np.stack([(boxes[:, 0] + boxes[:, 2]) / 2, (top + boxes[:, 3]) / 2, side], axis=1)


def _encoder(found: Checkpoint, prefix: str, codes: int) -> CodeEncoder:
    with torch.device("meta"):
        encoder = CodeEncoder(codes)
    # torchvision's classifier, which nothing here reads.
    tensors = {name: x for name, x in found.below(prefix).items() if not name.startswith("encoder.fc.")}
    fill(encoder, tensors, found.path, prefix)
    return encoder


def _codes(found: Checkpoint, prefix: str) -> int:
    """How many numbers EMOCA's expression encoder gives."""
    key = f"{prefix}layers.2.bias"
    size = found.tensors[key].numel() if key in found.tensors else None
    if size not in EXPRESSION_CODES:
        raise CodecError(
            f"{found.path}: {key}: {size} numbers, keys {named(found.below(prefix))}: expected {EXPRESSION_CODES}"
        )
    return size
