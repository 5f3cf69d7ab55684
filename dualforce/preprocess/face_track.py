"""Stage 3: where the face is and how far it is turned, about five times a second of the source video."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dualforce.codecs.face_landmarker import Face
from dualforce.codecs.media import iter_frames, probe
from dualforce.codecs.motion_landmarker import euler_degrees
from dualforce.codecs.motion_sidecar import Sidecar
from dualforce.codecs.protocols import FaceFinder, FoundFace
from dualforce.preprocess.finder import Finder
from dualforce.preprocess.reasons import Reason, Rejected

TRACK_STEP = 5  # pixel frames between two looks: 5 Hz
TRACK_SIDE = 960  # larger pictures are shrunk for the search
RIVAL_SHARE = 0.5  # a second face at least this large beside the first counts


@dataclass(frozen=True)
class FaceTrack:
    """Faces seen at pixel frames `times` [T] int64 of a video of `frames` pixel frames.

    `boxes` [T,4] float64 (x0, y0, x1, y1) in source pixels, NaN where no face was found; `rivals` [T] bool: another
    face of comparable size was there too; `yaw` [T] float64 in degrees, NaN where it is not known.
    """

    finder: Finder
    frames: int
    times: NDArray[np.int64]
    boxes: NDArray[np.float64]
    rivals: NDArray[np.bool_]
    yaw: NDArray[np.float64]

    @property
    def found(self) -> NDArray[np.bool_]:
        return np.isfinite(self.boxes[:, 0])

    def within(self, start: int, stop: int) -> FaceTrack:
        """What was seen at pixel frames [start, stop)."""
        here = (self.times >= start) & (self.times < stop)
        parts = {name: getattr(self, name)[here] for name in ("times", "boxes", "rivals", "yaw")}
        return replace(self, **parts)


def track_faces(video: Path, finder: FaceFinder) -> FaceTrack:
    """Find the largest face in every fifth pixel frame and the last one, each picture by itself: nothing is carried
    over a cut. How far a head is turned is known where the finder is MediaPipe's landmarker.
    Raises MediaError, CodecError."""
    width = probe(video).width
    times: list[int] = []
    boxes: list[list[float]] = []  # not small arrays: each would pin the heap where a picture was, and split its room
    rivals: list[bool] = []
    yaw: list[float] = []
    for index, picture in iter_frames(video, max_side=TRACK_SIDE, step=TRACK_STEP, last=True):
        faces = finder.faces(picture)
        times.append(index)
        boxes.append((faces[0].box * (width / picture.shape[1])).tolist() if faces else [np.nan] * 4)
        rivals.append(len(faces) > 1 and _side(faces[1]) >= RIVAL_SHARE * _side(faces[0]))
        yaw.append(_yaw(faces[0]) if faces else np.nan)
    found = Finder(finder.tag, version(finder.package), finder.weights)
    frames = times[-1] + 1
    return FaceTrack(found, frames, np.array(times), np.array(boxes), np.array(rivals), np.array(yaw))


def track_sidecar(frames: int, size: tuple[int, int], sidecar: Sidecar) -> FaceTrack:
    """The face boxes that a rendered clip of `size` (width, height) carries, one per pixel frame. Raises Rejected when
    the clip has another number of pixel frames, and for a box that is none of a face in it."""
    rows = len(sidecar.face_boxes)
    if rows != frames:
        raise Rejected(Reason.E_SIDECAR, f"motion.values: {rows} rows: expected {frames}, the video's pixel frames")
    _check_boxes(sidecar.face_boxes, size)
    unknown = np.full(rows, np.nan)
    finder = Finder(sidecar.motion.tag)
    return FaceTrack(finder, rows, np.arange(rows), sidecar.face_boxes, np.zeros(rows, np.bool_), unknown)


def _yaw(face: FoundFace) -> float:
    return float(euler_degrees(face.matrix)[1]) if isinstance(face, Face) else np.nan


def _side(face: FoundFace) -> float:
    return float(np.max(face.box[2:] - face.box[:2]))


def _check_boxes(boxes: NDArray[np.float64], size: tuple[int, int]) -> None:
    """Raise Rejected for a box [T,4] whose middle lies outside the picture, or that is more than twice as large: what
    is cut out there would be edge pixels, as many as the box is large."""
    with np.errstate(over="ignore"):
        middle, sides = boxes[:, :2] / 2 + boxes[:, 2:] / 2, boxes[:, 2:] - boxes[:, :2]
    right = (middle >= 0) & (middle <= size) & (sides <= 2 * max(size))
    if not right.all():
        row = int(np.argmin(right.all(axis=1)))
        detail = f"face_boxes[{row}]: {boxes[row].tolist()}: expected a face in a picture of {size[0]} x {size[1]}"
        raise Rejected(Reason.E_SIDECAR, detail)
