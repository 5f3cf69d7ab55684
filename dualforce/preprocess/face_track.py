"""Stage 1: where the face is, about five times a second of the source video."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dualforce.codecs.media import iter_frames, probe
from dualforce.codecs.motion_sidecar import Sidecar
from dualforce.codecs.protocols import FaceFinder, FoundFace
from dualforce.preprocess.reasons import Reason, Rejected

TRACK_STEP = 5  # pixel frames between two looks: 5 Hz
TRACK_SIDE = 960  # larger pictures are shrunk for the search
RIVAL_SHARE = 0.5  # a second face at least this large beside the first counts


@dataclass(frozen=True)
class FaceTrack:
    """Faces seen at pixel frames `times` [T] int64 of a video of `frames` pixel frames.

    `boxes` [T,4] float64 (x0, y0, x1, y1) in source pixels, NaN where no face was found; `rivals` [T] bool: another
    face of comparable size was there too. `tag` names the finder.
    """

    tag: str
    frames: int
    times: NDArray[np.int64]
    boxes: NDArray[np.float64]
    rivals: NDArray[np.bool_]

    @property
    def found(self) -> NDArray[np.bool_]:
        return np.isfinite(self.boxes[:, 0])


def track_faces(video: Path, finder: FaceFinder) -> FaceTrack:
    """Find the largest face in every fifth pixel frame and the last one, and close the finder. Raises MediaError,
    CodecError."""
    width = probe(video).width
    times: list[int] = []
    boxes: list[NDArray[np.float64]] = []
    rivals: list[bool] = []
    with closing(finder):
        for index, picture in iter_frames(video, max_side=TRACK_SIDE, step=TRACK_STEP, last=True):
            faces = finder.faces(picture)
            times.append(index)
            boxes.append(faces[0].box * (width / picture.shape[1]) if faces else np.full(4, np.nan))
            rivals.append(len(faces) > 1 and _side(faces[1]) >= RIVAL_SHARE * _side(faces[0]))
    return FaceTrack(finder.tag, times[-1] + 1, np.array(times), np.array(boxes), np.array(rivals))


def track_sidecar(video: Path, sidecar: Sidecar) -> FaceTrack:
    """The face boxes that a rendered clip carries, one per pixel frame. Raises MediaError, and Rejected when the clip
    has another number of pixel frames."""
    *_, (last, _) = iter_frames(video, step=10**9, last=True)
    rows = len(sidecar.face_boxes)
    if rows != last + 1:
        raise Rejected(Reason.E_SIDECAR, f"motion.values: {rows} rows: expected {last + 1}, the video's pixel frames")
    return FaceTrack(sidecar.motion.tag, rows, np.arange(rows), sidecar.face_boxes, np.zeros(rows, np.bool_))


def _side(face: FoundFace) -> float:
    return float(np.max(face.box[2:] - face.box[:2]))
