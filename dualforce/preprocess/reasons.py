"""Why a video, or a window of it, does not become a sample. E_ codes are files that cannot be used, R_ codes are
footage that must not be."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any


class Reason(StrEnum):
    """Reason codes, as they stand in the manifest."""

    E_DECODE = "E_DECODE"  # not a video, damaged, or unreadable
    E_SIDECAR = "E_SIDECAR"  # the sidecar contradicts its format or the video
    E_NONFINITE = "E_NONFINITE"  # an extractor gave NaN or infinity
    E_INTERNAL = "E_INTERNAL"  # a library failed in a way no other code describes
    E_CRASH = "E_CRASH"  # the process that read the video died
    R_DUPLICATE = "R_DUPLICATE"  # the same bytes as another file of the folder
    R_NOAUDIO = "R_NOAUDIO"  # no sound stream, or none during the window
    R_SILENT = "R_SILENT"  # a sound stream with nothing in it
    R_CLIPPED = "R_CLIPPED"  # the sound is cut off at full scale
    R_NOSPEECH = "R_NOSPEECH"  # too little speech in the window
    R_SHORT = "R_SHORT"  # a video or scene with fewer pixel frames than one window
    R_NOFACE = "R_NOFACE"  # a face is missing in too many frames, or in one whose motion is needed
    R_SMALLFACE = "R_SMALLFACE"  # the face has too few pixels
    R_MULTIFACE = "R_MULTIFACE"  # another face nearly as large
    R_YAW = "R_YAW"  # the head is turned too far for too long
    R_BLUR = "R_BLUR"  # the face is out of focus or smeared
    R_CUT = "R_CUT"  # the face jumps within the window: a cut that the scenes do not show


class Rejected(Exception):
    """Raised by a stage: this video or window is not used, and why."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def part_of(entry: Mapping[str, Any]) -> str:
    """Which part of a video a rejection in the manifest is about, in words."""
    parts = [f"{name} {entry[name]}" for name in ("scene", "window") if name in entry]
    return ", ".join(parts) or "all"
