"""Stage 1: where the picture cuts from one shot to another. The one file that imports `scenedetect`.

PySceneDetect's AdaptiveDetector is fed with pixel frames of the project's own decoder: its cuts are pixel frames on the
project's clock, whatever the file's frame rate. It sees hard cuts between pictures that differ. A fade through black is
found here: the middle of black pictures between others is a cut. A dissolve (`dissolves.py`) is a scene of its own,
shorter than a window. Cuts between two takes of one picture are not found (a face that jumps is found later, by the
crop).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from dualforce.codecs.media import Treatment, iter_frames
from dualforce.codecs.protocols import CodecError, Pixels
from dualforce.preprocess.dissolves import Dissolves
from dualforce.preprocess.finder import Finder
from dualforce.types import FPS

TAG = "pyscenedetect-adaptive-black-dissolve-v3"
SIDE = 256  # pictures are shrunk to this for the comparison
RATIO = 3.0  # a cut changes the picture this many times as much as its neighbours do,
CHANGE = 17.0  # and by at least this much: mean of the differences of hue, saturation and brightness, 0 to 255
CHANGE_ALONE = 27.0  # by this much near the ends, where there are fewer neighbours to compare with
AROUND = 2  # neighbours on either side
PIECE = 80  # pixel frames of a dissolve's scenes at most, fewer than a window has
BLACK = 4.0  # a picture with a smaller mean is black, 0 to 255; heads in the dark have several times it


@dataclass(frozen=True)
class Scene:
    """Pixel frames [start, stop) of a video without a cut in between; `index` counts from 0. Those of a `dissolve`
    show two shots."""

    index: int
    start: int
    stop: int
    dissolve: bool = False

    @property
    def length(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"scene {self.index} (pixel frames {self.start} to {self.stop - 1}{', a dissolve' * self.dissolve})"


@dataclass(frozen=True)
class Scenes:
    """All scenes of a video in order, without gap."""

    finder: Finder
    parts: tuple[Scene, ...]

    @property
    def frames(self) -> int:
        return self.parts[-1].stop


def find_scenes(video: Path, treatment: Treatment | None = None) -> Scenes:
    """The scenes of a video; `treatment` is told of its pictures. Raises MediaError, CodecError."""
    return scenes_of(picture for _, picture in iter_frames(video, max_side=SIDE, treatment=treatment))


def scenes_of(pictures: Iterable[Pixels]) -> Scenes:
    """The scenes of consecutive pixel frames [H,W,3] uint8, at least one. Raises CodecError without the package."""
    try:
        import scenedetect
        from scenedetect.detectors import AdaptiveDetector
    except ImportError as error:
        raise CodecError("scenedetect is not installed: pip install 'dualforce[data]'") from error
    detector = AdaptiveDetector(adaptive_threshold=RATIO, min_content_val=CHANGE, window_width=AROUND, min_scene_len=1)
    cuts: set[int] = set()
    first: list[Pixels] = []
    last: deque[Pixels] = deque(maxlen=2 * AROUND + 1)
    count = 0
    lit: list[int] = []  # the last picture that is not black
    dark: list[tuple[int, int]] = []  # black pictures [start, stop) with others before and after
    dissolves = Dissolves()
    for count, picture in enumerate(pictures, start=1):
        if picture.mean() >= BLACK:
            dark += [(place + 1, count - 1) for place in lit if place + 1 < count - 1]
            lit = [count - 1]
            dissolves.add(picture)
        else:
            dissolves.add_black()
        last.append(picture[..., ::-1].copy())  # the detectors want BGR
        if len(first) <= 2 * AROUND:
            first.append(last[-1])
        found = detector.process_frame(scenedetect.FrameTimecode(count - 1, float(FPS)), last[-1])
        # The first picture's own change is unknown and counts as 0 beside picture 2: that one is judged below.
        cuts.update(time.frame_num for time in found if time.frame_num > AROUND)
    if not count:
        raise ValueError("no pictures: expected at least one")
    # Near the ends a picture lacks neighbours on one side. A stray one of another shot there would be the reference
    # image of the first window, or the last thing that the last window shows.
    cuts.update(place for place in _end_cuts(first) if place <= AROUND)
    cuts.update(count - len(last) + place for place in _end_cuts(list(last)) if place >= len(last) - AROUND)
    cuts.update((start + stop) // 2 for start, stop in dark if not cuts.intersection(range(start, stop + 1)))
    return Scenes(Finder(TAG, str(scenedetect.__version__)), _parts(cuts, dissolves.parts(), count))


def _parts(cuts: set[int], dissolves: list[tuple[int, int]], count: int) -> tuple[Scene, ...]:
    """Scenes between cuts, and in place of cuts within a dissolve one or more that are its own."""
    edges = {0, count, *cuts}
    mixed: set[int] = set()
    for start, stop in dissolves:
        pieces = set(range(start, stop, PIECE))
        edges = {edge for edge in edges if not start < edge < stop} | pieces | {stop}
        mixed |= pieces
    return tuple(
        Scene(index, start, stop, start in mixed) for index, (start, stop) in enumerate(pairwise(sorted(edges)))
    )


def _end_cuts(pictures: list[Pixels]) -> list[int]:
    """Places in a few pictures whose change is large by itself and against the others' median, on whatever side."""
    from scenedetect import FrameTimecode, StatsManager
    from scenedetect.detectors import ContentDetector

    detector = ContentDetector()
    detector.stats_manager = StatsManager()
    changes = []
    for place, picture in enumerate(pictures):
        time = FrameTimecode(place, float(FPS))
        detector.process_frame(time, picture)
        if place:
            changes += detector.stats_manager.get_metrics(time, [ContentDetector.FRAME_SCORE_KEY])
    others = [float(np.median([*changes[:n], *changes[n + 1 :]] or [0.0])) for n in range(len(changes))]
    return [n + 1 for n, change in enumerate(changes) if change >= max(CHANGE_ALONE, RATIO * others[n])]
