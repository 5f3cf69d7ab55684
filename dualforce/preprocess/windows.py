"""Stage 4: the windows of 81 pixel frames (21 latent frames), one sample each, one after the other from frame 0."""

from __future__ import annotations

from dataclasses import dataclass

from dualforce.codecs.media_clock import PlacedSound
from dualforce.preprocess.reasons import Reason, Rejected
from dualforce.types import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME


@dataclass(frozen=True)
class Window:
    """Window number `index` of a video: pixel frames [start, start + length)."""

    index: int
    start: int
    length: int

    @property
    def frames(self) -> range:
        return range(self.start, self.start + self.length)

    @property
    def samples(self) -> slice:
        """Its sound, in 16 kHz samples of the video's track."""
        return slice(self.start * SAMPLES_PER_FRAME, (self.start + self.length) * SAMPLES_PER_FRAME)


def plan_windows(frames: int, length: int) -> list[Window]:
    """All whole windows of `length` in a video of `frames` pixel frames; what is left at its end is not used."""
    return [Window(index, index * length, length) for index in range(frames // length)]


def check_window(window: Window, sound: PlacedSound, cuts: tuple[tuple[int, int], ...]) -> None:
    """Raise Rejected unless the window has sound from end to end (R_NOAUDIO) and no cut (R_CUT)."""
    wanted = window.samples
    if wanted.start < sound.start * SAMPLE_RATE - SAMPLES_PER_FRAME or wanted.stop > len(sound.wave):
        span = f"{sound.start:.2f} to {len(sound.wave) / SAMPLE_RATE:.2f} s"
        needs = f"{window.start / FPS:.2f} to {(window.start + window.length) / FPS:.2f} s"
        raise Rejected(Reason.R_NOAUDIO, f"sound from {span}: expected it from {needs}")
    for before, after in cuts:
        if window.start < after and before < window.frames[-1]:
            raise Rejected(Reason.R_CUT, f"the face jumps between pixel frames {before} and {after}")
