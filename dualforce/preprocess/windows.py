"""Stage 5: the windows of 81 pixel frames (21 latent frames), one sample each, one after the other in each scene."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dualforce.codecs.media_clock import PlacedSound
from dualforce.preprocess.reasons import Reason, Rejected
from dualforce.preprocess.scenes import Scene
from dualforce.types import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME

LENGTH = 81  # pixel frames of a window: 21 latent frames


@dataclass(frozen=True)
class Window:
    """Window number `index` of a video: pixel frames [start, start + length), all of scene number `scene`."""

    index: int
    start: int
    length: int
    scene: int = 0

    @property
    def frames(self) -> range:
        return range(self.start, self.start + self.length)

    @property
    def samples(self) -> slice:
        """Its sound, in 16 kHz samples of the video's track."""
        return slice(self.start * SAMPLES_PER_FRAME, (self.start + self.length) * SAMPLES_PER_FRAME)


def plan_windows(scenes: Iterable[Scene], length: int = LENGTH) -> list[Window]:
    """All whole windows of `length` in the scenes, numbered through; what is left at a scene's end is not used."""
    starts = [(scene, scene.start + n * length) for scene in scenes for n in range(scene.length // length)]
    return [Window(index, start, length, scene.index) for index, (scene, start) in enumerate(starts)]


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
