"""A stretch of a video as a whole: its pictures and the sound to them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dualforce.codecs.media.container import MediaError
from dualforce.codecs.media.pictures import iter_frames, probe
from dualforce.codecs.media.sound import read_sound
from dualforce.codecs.media_clock import PlacedSound
from dualforce.codecs.protocols import Pixels
from dualforce.types import FPS, SAMPLE_RATE


@dataclass(frozen=True)
class Video:
    """Pictures [P,H,W,3] uint8 at 25 frames a second and the sound on the same clock (None without a sound stream)."""

    frames: Pixels
    sound: PlacedSound | None


def read_video(path: Path, *, max_side: int | None = None, start: int = 0, stop: int | None = None) -> Video:
    """Pixel frames [start, stop) of a video and its sound cut to the same span.

    Memory grows with the span asked for; use `iter_frames` for long files. Raises MediaError.
    """
    frames = [picture for _, picture in itertools.islice(iter_frames(path, max_side=max_side), start, stop)]
    if not frames:
        raise MediaError(path, f"frames {start}..{stop}: the video has no such frames")
    sound = read_sound(path, probe(path).zero)
    if sound is None:
        return Video(np.stack(frames), None)
    samples = SAMPLE_RATE // FPS
    wave = sound.wave[start * samples : (start + len(frames)) * samples]
    return Video(np.stack(frames), PlacedSound(wave, max(0.0, sound.start - start / FPS), sound.gap))
