"""What every codec offers, whatever is behind it. Each has a `tag` that names the extractor and its version: latents,
features and motion of different tags are different things and never meet in one run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Pixels = NDArray[np.uint8]
Wave = NDArray[np.float32]


class CodecError(ValueError):
    """A codec that cannot be used or a result that cannot be; one line for the user."""


class VideoCodec(Protocol):
    """Latents [F,C,H/stride,W/stride] fp32, not normalised, of P = 1 + 4 (F-1) pixel frames [P,H,W,3] uint8."""

    tag: str
    channels: int
    stride: int

    def encode(self, pixels: Pixels) -> Tensor: ...

    def encode_image(self, picture: Pixels) -> Tensor: ...

    def decode(self, latents: Tensor) -> Pixels: ...

    def decode_frames(self, latents: Tensor, first: bool) -> Pixels: ...


class AudioEncoder(Protocol):
    """Features [2 P, width] fp32, not normalised, at 50 Hz of the 16 kHz mono sound [640 P] of P pixel frames."""

    tag: str
    width: int
    hz: int

    def encode(self, wave: Wave) -> Tensor: ...


class MotionEncoder(Protocol):
    """Motion [P, width] fp32, not normalised, of a face crop's pixel frames [P,H,W,3] uint8."""

    tag: str
    width: int
    names: tuple[str, ...]

    def encode(self, pixels: Pixels, fps: float) -> Tensor: ...


class Flame(NamedTuple):
    """FLAME parameters `values` [P,width] fp32, not normalised. They are data where `valid` [P] bool is True; elsewhere
    they are zero only because something has to stand there."""

    values: Tensor
    valid: Tensor


class FlameEncoder(Protocol):
    """FLAME parameters of pictures [P,H,W,3] uint8 with the face in `boxes` [P,4] (x0, y0, x1, y1; forehead to chin; in
    pixels of the picture; NaN where there is none)."""

    tag: str
    width: int
    names: tuple[str, ...]

    def encode(self, pixels: Pixels, boxes: NDArray[np.float64]) -> Flame: ...


class FoundFace(Protocol):
    """A face's box [4] float64 (x0, y0, x1, y1) in pixels, forehead to chin and cheek to cheek."""

    @property
    def box(self) -> NDArray[np.float64]: ...


class FaceFinder(Protocol):
    """Faces in a picture [H,W,3] uint8 RGB, each picture by itself, the longest box side first."""

    tag: str

    def faces(self, picture: Pixels) -> Sequence[FoundFace]: ...

    def close(self) -> None: ...
