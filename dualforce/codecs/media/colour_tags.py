"""What a decoded picture says of its colours, and the RGB picture that follows from it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualforce.codecs.media.colour import Coding, ToSdr, Transfer
from dualforce.codecs.protocols import Pixels

# Numbers of ITU-T H.273, as FFmpeg has them.
TRANSFERS: dict[int, Transfer] = {16: "pq", 18: "hlg"}  # others are SDR
TRANSFER_NAMES = {14: "bt2020-10", 15: "bt2020-12", 16: "smpte2084", 18: "arib-std-b67"}
PRIMARIES = {1: "bt709", 9: "bt2020", 12: "display-p3"}
WIDE = frozenset(("bt2020", "display-p3"))
UNSAID = 2
RGB = 0
# Weights (red, blue) of Y'. Of a picture that does not say it FFmpeg takes BT.601's.
LUMA = {
    1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593),
}  # fmt: skip
FULL = 2  # of the ranges


class ColourError(ValueError):
    """Colours that cannot be read; one line for the user."""


def coding_of(frame: Any) -> Coding | None:
    """How an HDR or wide-gamut picture is coded, or one with BT.2020's matrix; None for an ordinary one. Raises
    ColourError for a matrix that is none of LUMA's: colours would be wrong."""
    matrix = frame.colorspace
    if not frame.format.is_rgb and matrix not in {*LUMA, UNSAID, RGB}:
        raise ColourError(f"colour matrix {matrix} (H.273): expected BT.601, BT.709, BT.2020 or RGB")
    transfer: Transfer = TRANSFERS.get(frame.color_trc, "sdr")
    primaries = PRIMARIES.get(frame.color_primaries, "bt709" if transfer == "sdr" else "bt2020")
    if transfer == "sdr" and primaries not in WIDE and matrix != 9:
        return None
    luma = None if frame.format.is_rgb else LUMA.get(matrix, LUMA[9] if primaries == "bt2020" else LUMA[1])
    full = frame.color_range == FULL or (luma is None and frame.color_range == 0)
    return Coding(transfer, primaries, luma, full, bits_of(frame))


def bits_of(frame: Any) -> int:
    """Bits of one number of a picture."""
    return max(int(component.bits) for component in frame.format.components)


class Colours:
    """RGB pictures of the frames of one stream."""

    def __init__(self) -> None:
        self._mapping: ToSdr | None = None

    def picture(self, frame: Any, size: tuple[int, int]) -> Pixels:
        """BT.709 picture [H,W,3] uint8 of a decoded frame, scaled to `size` (width, height). Raises ColourError."""
        method = "AREA" if (frame.width, frame.height) != size else None
        coding = coding_of(frame)
        if coding is None:
            shown = frame.reformat(width=size[0], height=size[1], format="rgb24", interpolation=method)
            picture: Pixels = shown.to_ndarray()
            return picture
        if self._mapping is None or self._mapping.coding != coding:
            self._mapping = ToSdr(coding)
        return self._mapping.picture(_planes(frame, coding, size, method))


def _planes(
    frame: Any, coding: Coding, size: tuple[int, int], method: str | None
) -> tuple[NDArray[np.uint16], NDArray[np.uint16], NDArray[np.uint16]]:
    """Y', Cb, Cr, or red, green, blue, [H,W] each, moved up to 16 bits and scaled."""
    # Not RGB by FFmpeg: by way of 16 bits and with BT.2020 its white of limited range is 0.4 to 0.8 % too dark, which
    # is much for PQ.
    kind = "gbrp16le" if coding.luma is None else "yuv444p16le"
    one, two, three = (_plane(plane) for plane in frame.reformat(*size, kind, interpolation=method).planes)
    return (one, two, three) if coding.luma is not None else (three, one, two)  # FFmpeg: green, blue, red


def _plane(plane: Any) -> NDArray[np.uint16]:
    return np.frombuffer(plane, np.uint16).reshape(plane.height, plane.line_size // 2)[:, : plane.width]
