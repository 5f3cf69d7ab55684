"""Between pictures as bytes and the scale [-1, 1] of the video codecs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dualforce.codecs.protocols import VIDEO_STRIDE, Pixels


def check_pixels(pixels: Pixels, dims: int) -> None:
    """Raise ValueError unless `pixels` are uint8 [P,H,W,3] (`dims` 4) or [H,W,3] (3), H and W multiples of 8."""
    shape = pixels.shape
    odd = any(edge % VIDEO_STRIDE for edge in shape[-3:-1])
    if pixels.dtype != np.uint8 or len(shape) != dims or shape[-1] != 3 or odd:
        layout = "uint8 [P,H,W,3]" if dims == 4 else "uint8 [H,W,3]"
        raise ValueError(f"pixels {pixels.dtype} {shape}: expected {layout} with H and W multiples of {VIDEO_STRIDE}")


def to_unit(pixels: Pixels) -> Tensor:
    """The same values on the scale [-1, 1], fp32."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).float() / 127.5 - 1


def to_bytes(values: Tensor) -> Pixels:
    """fp32 on the scale [-1, 1] -> uint8, rounded and clipped."""
    return ((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
