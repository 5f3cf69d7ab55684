"""The square crop around a face: its geometry, and cutting it out with antialiasing.

Boxes are [N,4] float64 (x0, y0, x1, y1) in pixels, x to the right and y down, 0 at the outer edge of the first pixel.
Squares are [N,3] float64 (centre x, centre y, side).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualforce.codecs.protocols import Pixels

FACE_SHARE = 0.5  # longer side of the face box as a share of the crop
RAISE = 0.06  # the crop's centre lies this share of its side above the face's: room for hair, eyes and mouth inside

BAND = 32  # target pixels resized by one matrix product

Boxes = NDArray[np.float64]


def face_squares(boxes: Boxes) -> NDArray[np.float64]:
    """Square crop [N,3] around each face box [N,4] (forehead to chin): the face takes about half of it."""
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    side = np.maximum(width, height) / FACE_SHARE
    centre_x, centre_y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    return np.stack([centre_x, centre_y - RAISE * side, side], axis=1)


def square_boxes(squares: NDArray[np.float64]) -> Boxes:
    """Boxes [N,4] of squares [N,3]."""
    half = squares[:, 2:] / 2
    return np.concatenate([squares[:, :2] - half, squares[:, :2] + half], axis=1)


def square_crop(picture: Pixels, square: NDArray[np.float64], size: int) -> Pixels:
    """Cut one square (centre x, centre y, side; any fraction of a pixel) out of a picture [H,W,3] uint8 and resize it
    to [size,size,3] uint8 with an antialiased bicubic filter. Outside the picture its edge pixels are repeated."""
    centre_x, centre_y, side = (float(value) for value in square)
    if not side > 0:
        raise ValueError(f"crop side {side}: expected more than 0")
    rows = _filter(centre_y - side / 2, side, picture.shape[0], size)
    cols = _filter(centre_x - side / 2, side, picture.shape[1], size)
    left, right = min(band.source.start for band in cols), max(band.source.stop for band in cols)
    tall = torch.empty(size, right - left, 3)
    room = torch.empty(max(band.source.stop - band.source.start for band in rows), right - left, 3)  # once, not a band
    for band in rows:
        patch = room[: band.source.stop - band.source.start]
        patch.copy_(torch.from_numpy(picture[band.source, left:right]))
        torch.matmul(band.weights, patch.flatten(1), out=tall[band.target].flatten(1))
    small = torch.empty(size, size, 3)
    for band in cols:
        patch = tall[:, band.source.start - left : band.source.stop - left]
        small[:, band.target] = torch.matmul(band.weights, patch)  # [b,w] @ [S,w,3]
    return small.round_().clamp_(0, 255).to(torch.uint8).numpy()


def resize(picture: Pixels, size: int) -> Pixels:
    """Resize a square picture [H,H,3] uint8 to [size,size,3] with the same filter as `square_crop`."""
    side = picture.shape[0]
    return picture if side == size else square_crop(picture, np.array([side / 2, side / 2, side]), size)


class _Band(NamedTuple):
    """Some consecutive target pixels, the source pixels they need, and their weights [target, source] fp32."""

    target: slice
    source: slice
    weights: Tensor


def _filter(start: float, length: float, limit: int, size: int) -> list[_Band]:
    """Weights of an antialiased resize of [start, start + length) to `size` pixels along one axis.

    The bicubic kernel (Keys 1981, a = -1/2) is stretched by the scale when shrinking, each target pixel's weights sum
    to 1, and source indices outside [0, limit) are clamped. In bands, because the whole matrix is nearly all zeros.
    """
    scale = length / size
    reach = 2.0 * max(scale, 1.0)
    centres = start + (np.arange(size) + 0.5) * scale
    first = np.floor(centres - reach).astype(np.int64)
    index = first[:, None] + np.arange(int(np.ceil(2 * reach)) + 2)
    weight = _keys((index + 0.5 - centres[:, None]) / max(scale, 1.0))
    weight /= weight.sum(axis=1, keepdims=True)
    index = index.clip(0, limit - 1)
    bands = []
    for begin in range(0, size, BAND):
        rows, places = weight[begin : begin + BAND], index[begin : begin + BAND]
        low, high = int(places.min()), int(places.max()) + 1
        dense = np.zeros((len(rows), high - low))
        np.add.at(dense, (np.arange(len(rows))[:, None], places - low), rows)
        target = slice(begin, begin + len(rows))
        bands.append(_Band(target, slice(low, high), torch.from_numpy(dense).float()))
    return bands


def _keys(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cubic convolution kernel with a = -1/2."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))
