"""A clip of one rendered person talking: sound and motion made first, pictures drawn one by one, then the sidecar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualforce.types import FPS
from tools.render.identity import Identity, make_identity
from tools.render.motion import MOTION_TAG, Pose, make_motion
from tools.render.scene import Box, Picture, draw, draw_background
from tools.render.sound import make_speech, synthesise

LICENCE = "CC0-1.0"


@dataclass(frozen=True)
class Clip:
    """Everything about a clip but its pictures; P pixel frames of size x size pixels at 25 frames a second."""

    who: Identity
    size: int
    wave: NDArray[np.float32]  # [P * 640], 16 kHz
    motion: tuple[Pose, ...]  # P
    audio_offset_s: float
    seed: int
    index: int

    def pictures(self) -> Iterator[Picture]:
        """Draw the pictures in order; one is held at a time."""
        background = draw_background(self.who, self.size)
        for pose in self.motion:
            yield draw(self.who, pose, background)

    def sidecar(self, face_boxes: Sequence[Box], mouth_boxes: Sequence[Box]) -> dict[str, Any]:
        """The JSON object stored beside the clip; the boxes are those of `pictures()`."""
        return {
            "format": "dualforce-sidecar",
            "version": 1,
            "identity": self.who.name,
            "licence": LICENCE,
            "fps": FPS,
            "motion": {
                "tag": MOTION_TAG,
                "names": list(Pose._fields),
                "values": [list(pose) for pose in self.motion],
            },
            "face_boxes": [list(box) for box in face_boxes],
            "mouth_boxes": [list(box) for box in mouth_boxes],
            "audio_offset_s": self.audio_offset_s,
            "generator": {"tool": "tools.render_sample", "seed": self.seed, "index": self.index},
        }


def make_clip(seed: int, index: int, frames: int, size: int, offset_s: float = 0.0) -> Clip:
    """Person `index` of the set `seed` talking for `frames` pixel frames.

    What is seen depends on (seed, index, frames, size) only: `offset_s` shifts the sound alone (positive: it is heard
    that much later than it is seen). Raises ValueError for an offset beyond `sound.MARGIN_S`.
    """
    who = make_identity(seed, index)
    speech_rng, motion_rng, sound_rng = (np.random.default_rng([seed, index, stream]) for stream in (2, 3, 4))
    speech = make_speech(speech_rng, frames / FPS)
    wave = synthesise(speech, sound_rng, frames / FPS, pitch_hz=who.pitch_hz, tract=who.tract, offset_s=offset_s)
    motion = tuple(make_motion(motion_rng, speech, frames))
    return Clip(who, size, wave, motion, offset_s, seed, index)
