"""What was put right in the pictures of a file: for the record of its samples."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from dualforce.codecs.media import colour, colour_tags, interlaced


@dataclass
class Treatment:
    """Filled while a file's pictures are read: of interlaced ones the number, all else as the first picture has it."""

    interlaced: int = 0
    first: dict[str, Any] | None = None

    def add(self, frame: Any, stream: Any) -> None:
        """Count a frame as it comes from the decoder. Raises ColourError."""
        self.interlaced += bool(frame.interlaced_frame)
        if self.first is None:
            self.first = _departures(frame, stream)

    def entry(self) -> dict[str, Any]:
        """As JSON, without what an ordinary file (upright, square pixels, 8 bits, progressive, SDR) does not have."""
        found = dict(self.first or {})
        if self.interlaced:
            found |= {"interlaced": True, "deinterlacer": interlaced.METHOD}
        return found


def _departures(frame: Any, stream: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if turned := round(frame.rotation / 90) % 4:
        found["rotation"] = 90 * turned
    ratio = Fraction(stream.sample_aspect_ratio or 1)
    if ratio > 0 and ratio != 1:
        found["pixel_aspect"] = f"{ratio.numerator}:{ratio.denominator}"
    if (bits := colour_tags.bits_of(frame)) > 8:
        found["bits"] = bits
    if any(component.is_alpha for component in frame.format.components):
        found["alpha"] = "ignored"
    coding = colour_tags.coding_of(frame)
    if coding is not None:
        transfer = colour_tags.TRANSFER_NAMES.get(frame.color_trc, "sdr")
        found |= {"transfer": transfer, "primaries": coding.primaries, "colour": colour.TAG}
    return found
