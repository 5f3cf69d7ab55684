"""Stage 4: one stable square crop around the face, for every pixel frame.

Where the face hardly moves the crop stands still, so that the background does too; where it does, the crop follows it
smoothly. It is wide enough at every tracked frame to hold the whole face. Between tracked frames boxes are
interpolated. Each scene has a crop of its own, and so have the parts before and after a jump of the face within one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dualforce.codecs.face_box import Pixels, face_squares, square_boxes, square_crop
from dualforce.codecs.media import iter_frames
from dualforce.preprocess.face_track import FaceTrack
from dualforce.preprocess.scenes import Scene
from dualforce.types import FPS

TAG = "face-square-v1"
STEADY = 0.12  # a crop stands still while the face moves and grows by less than this share of its side
CENTRE_SECONDS = 0.6  # standard deviation of the Gaussian that smooths a moving crop's centre
SIDE_SECONDS = 1.2  # and its side
JUMP = 0.8  # a cut: the face moves by this share of its own size between two tracked frames
GROWTH = 1.6  # or changes its size by this factor

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class CropTrack:
    """Squares [P,3] float64 (centre x, centre y, side) in source pixels, one per pixel frame, NaN outside the scenes
    that were planned. In each of `cuts` (a, b) the face jumps within a scene, after pixel frame a and not after b."""

    tag: str
    squares: Floats
    cuts: tuple[tuple[int, int], ...]


def plan_crop(track: FaceTrack, scenes: Iterable[Scene]) -> CropTrack:
    """The crop of every pixel frame of the scenes; in each of them a face was found at least once."""
    squares = np.full((track.frames, 3), np.nan)
    cuts: list[tuple[int, int]] = []
    for scene in scenes:
        part, jumps = _plan_scene(track.within(scene.start, scene.stop), scene)
        squares[scene.start : scene.stop] = part
        cuts += jumps
    return CropTrack(TAG, squares, tuple(cuts))


def _plan_scene(track: FaceTrack, scene: Scene) -> tuple[Floats, list[tuple[int, int]]]:
    """Squares of a scene's pixel frames, and the jumps of the face in it."""
    times, boxes = track.times[track.found], track.boxes[track.found]
    after = _cuts(boxes)
    cuts = [(int(times[i]), int(times[i + 1])) for i in after]
    edges = [0, *(i + 1 for i in after), len(times)]
    bounds = [scene.start, *(b for _, b in cuts), scene.stop]
    parts = [
        _smooth(np.arange(bounds[n], bounds[n + 1]), times[edges[n] : edges[n + 1]], boxes[edges[n] : edges[n + 1]])
        for n in range(len(edges) - 1)
    ]
    return np.concatenate(parts), cuts


def crop_frames(video: Path, crop: CropTrack, spans: list[range], size: int) -> Iterator[tuple[int, Pixels]]:
    """Yield (k, crop [size,size,3] uint8) for the pixel frames k inside `spans`, which are in order and apart. Raises
    MediaError."""
    waiting = deque(spans)
    for index, picture in iter_frames(video):
        while waiting and index >= waiting[0].stop:
            waiting.popleft()
        if not waiting:
            return
        if index in waiting[0]:
            found = square_crop(picture, crop.squares[index], size)
            del picture  # of 8K, 100 MB beside the next one
            yield index, found
        else:
            del picture


def _cuts(boxes: Floats) -> list[int]:
    """Indices i such that the face jumps between boxes i and i + 1."""
    centre, side = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    moved = np.linalg.norm(np.diff(centre, axis=0), axis=1) / np.minimum(side[1:], side[:-1])
    grown = np.maximum(side[1:] / side[:-1], side[:-1] / side[1:])
    return [int(i) for i in np.flatnonzero((moved > JUMP) | (grown > GROWTH))]


def _smooth(frames: NDArray[np.int64], times: NDArray[np.int64], boxes: Floats) -> Floats:
    """Squares [len(frames),3] of one shot from its tracked boxes."""
    track = np.stack([np.interp(frames, times, boxes[:, i]) for i in range(4)], axis=1)
    raw = face_squares(track)
    still = np.median(raw, axis=0)
    if float(np.abs(raw - still).max()) <= STEADY * still[2]:
        squares = np.broadcast_to(still, raw.shape).copy()
        squares[:, 2] = max(still[2], float(_needed(track, squares).max()))
        return squares
    squares = np.stack(
        [_gauss(raw[:, i], FPS * (SIDE_SECONDS if i == 2 else CENTRE_SECONDS)) for i in range(3)], axis=1
    )
    squares[:, 2] = np.maximum(squares[:, 2], _needed(track, squares))
    return squares


def _needed(boxes: Floats, squares: Floats) -> Floats:
    """Side at which each square, its centre kept, holds its whole face box."""
    edges = square_boxes(np.concatenate([squares[:, :2], np.zeros((len(squares), 1))], axis=1))
    return 2 * np.abs(boxes - edges).max(axis=1)


def _gauss(values: Floats, sigma: float) -> Floats:
    """Gaussian smoothing, the first and last value repeated beyond the ends."""
    reach = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return np.convolve(np.pad(values, reach, mode="edge"), kernel / kernel.sum(), mode="valid")
