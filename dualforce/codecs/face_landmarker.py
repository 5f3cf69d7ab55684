"""Faces by MediaPipe's FaceLandmarker: the one file that imports `mediapipe`.

The model file (`face_landmarker.task`, Apache-2.0) is given by path and never downloaded here.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dualforce.codecs.protocols import CodecError, Pixels

TAG = "mediapipe-face-landmarker-v1"
SHA256 = "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff"  # of the file that the tag names


class Face(NamedTuple):
    """One face: its box (x0, y0, x1, y1) [4] float64 in pixels around the 478 landmarks (forehead to chin), the 4x4
    matrix from the model head to camera space (centimetres), and the 52 blendshape scores with their names."""

    box: NDArray[np.float64]
    matrix: NDArray[np.float64]
    scores: NDArray[np.float64]
    names: tuple[str, ...]


class FaceLandmarkerModel:
    """A loaded FaceLandmarker. `video` follows one face through frames in order; otherwise each picture stands alone
    and up to `max_faces` are found. Use as a context manager, or call `close`."""

    tag = TAG
    package = "mediapipe"

    def __init__(self, model: Path, *, video: bool, max_faces: int = 1) -> None:
        self.weights = check_model_file(model)
        try:
            from mediapipe.tasks.python import BaseOptions, vision
        except ImportError as error:
            raise CodecError("MediaPipe is not installed: pip install 'dualforce[data]'") from error
        mode = vision.RunningMode.VIDEO if video else vision.RunningMode.IMAGE
        options = vision.FaceLandmarkerOptions(
            base_options=BaseOptions(model_asset_path=str(model)),
            running_mode=mode,
            num_faces=max_faces,
            output_face_blendshapes=True,
            output_facial_transformation_matrixes=True,
        )
        try:
            self._landmarker: Any = vision.FaceLandmarker.create_from_options(options)
        except (RuntimeError, ValueError) as error:
            cause = str(error).splitlines()[0]
            raise CodecError(f"{model}: not a usable face landmark model: {cause}") from error
        self._video = video

    def faces(self, picture: Pixels, milliseconds: int = 0) -> list[Face]:
        """Faces in a picture [H,W,3] uint8, largest first; of a video model's frames `milliseconds` must increase."""
        import mediapipe

        image = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(picture))
        if self._video:
            result = self._landmarker.detect_for_video(image, milliseconds)
        else:
            result = self._landmarker.detect(image)
        height, width = picture.shape[:2]
        parts = zip(result.face_landmarks, result.facial_transformation_matrixes, result.face_blendshapes, strict=True)
        found = [_face(points, matrix, shapes, width, height) for points, matrix, shapes in parts]
        return sorted(found, key=lambda face: -float(np.max(face.box[2:] - face.box[:2])))

    def close(self) -> None:
        self._landmarker.close()

    def __enter__(self) -> FaceLandmarkerModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def check_model_file(model: Path) -> str:
    """SHA-256 of the FaceLandmarker task file (a zip archive). Raises CodecError for another file: its numbers would
    have the tag of this one."""
    wanted = "expected MediaPipe's face_landmarker.task"
    if not model.is_file():
        raise CodecError(f"--face-landmarker {model}: no such file; {wanted}")
    if not zipfile.is_zipfile(model):
        raise CodecError(f"--face-landmarker {model}: not a task file; {wanted}")
    found = hashlib.sha256(model.read_bytes()).hexdigest()
    if found != SHA256:
        raise CodecError(f"--face-landmarker {model}: sha256 = {found}: expected {SHA256}, MediaPipe's own")
    return found


def _face(points: Any, matrix: Any, shapes: Any, width: int, height: int) -> Face:
    places = np.array([(point.x * width, point.y * height) for point in points])
    return Face(
        box=np.concatenate([places.min(axis=0), places.max(axis=0)]),
        matrix=np.asarray(matrix, np.float64),
        scores=np.array([shape.score for shape in shapes]),
        names=tuple(shape.category_name for shape in shapes),
    )
