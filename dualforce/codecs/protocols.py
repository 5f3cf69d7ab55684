"""What every codec offers, whatever is behind it. Each has a `tag` that names the extractor and its version: latents,
features and motion of different tags are different things and never meet in one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Pixels = NDArray[np.uint8]
Wave = NDArray[np.float32]


class Samples(Protocol):
    """16 kHz sound [N] float32 of which parts are asked for: an array, or one that lies on the disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Wave: ...


VIDEO_STRIDE = 8  # pixels along an edge of a latent, of every video codec


class CodecError(ValueError):
    """A codec that cannot be used or a result that cannot be; one line for the user."""


class ClipDecoder(Protocol):
    """Decodes the latents of one clip in order, in pieces of any length; the pixels do not depend on the pieces."""

    def decode(self, latents: Tensor) -> Pixels:
        """Pixels [p,H,W,3] of the next latent frames [n,C,h,w]: one of the clip's frame 0, four of every other."""


class VideoCodec(Protocol):
    """Latents [F,C,H/8,W/8] fp32, not normalised, of P = 1 + 4 (F-1) pixel frames [P,H,W,3] uint8.

    Causal: latent frame j depends on pixel frames 0 .. 4j alone, and `encode_image(x)` equals `encode([x, ...])[0]`.
    """

    tag: str
    channels: int

    def encode(self, pixels: Pixels) -> Tensor: ...

    def encode_image(self, picture: Pixels) -> Tensor: ...

    def decode(self, latents: Tensor) -> Pixels:
        """A whole clip at once: `decoder().decode(latents)`."""

    def decoder(self) -> ClipDecoder:
        """A decoder at the start of a clip."""

    def coded(self, height: int, width: int) -> dict[str, Any]:
        """How pictures of H,W pixels are coded, as far as the tag does not say it: JSON for a clip's `meta`."""


class AudioEncoder(Protocol):
    """Features [2 P, width] fp32, not normalised, at 50 Hz of the 16 kHz mono sound [640 P] of P pixel frames."""

    tag: str
    width: int
    hz: int

    def encode(self, wave: Wave) -> Tensor:
        """All features at once: what `stream` gives, one after the other."""

    def stream(self, wave: Samples) -> Iterator[Tensor]:
        """The features in parts, in order. Of long sound a part is held at a time."""


class TextEncoder(Protocol):
    """Embedding [n, width] fp32 of the n tokens of a text, 512 at most."""

    tag: str
    width: int

    def encode(self, text: str) -> Tensor: ...


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
    """Faces in a picture [H,W,3] uint8 RGB, each picture by itself, the longest box side first. `package` is the one it
    runs in, `weights` the SHA-256 of its file."""

    tag: str
    package: str
    weights: str

    def faces(self, picture: Pixels) -> Sequence[FoundFace]: ...

    def close(self) -> None: ...
