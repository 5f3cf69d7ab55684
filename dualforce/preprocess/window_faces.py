"""Where the face is in the crops of a window, in every pixel frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dualforce.codecs.face_box import Boxes, Pixels, square_boxes
from dualforce.codecs.face_landmarker import FaceLandmarkerModel
from dualforce.types import FPS


def find_faces(crops: Pixels, model: Path) -> Boxes:
    """Boxes [P,4] in pixels of the crops [P,S,S,3] uint8, NaN where no face is found. The face is tracked from frame to
    frame, starting afresh with every call. Raises CodecError."""
    boxes = np.full((len(crops), 4), np.nan)
    with FaceLandmarkerModel(model, video=True) as landmarker:
        for index, picture in enumerate(crops):
            faces = landmarker.faces(picture, round(index * 1000 / FPS))
            if faces:
                boxes[index] = faces[0].box
    return boxes


def boxes_in_crops(boxes: Boxes, squares: NDArray[np.float64], size: int) -> Boxes:
    """Boxes [P,4] of the source in pixels of its crops: the squares [P,3] of the source resized to `size`."""
    corners = square_boxes(squares)[:, :2]
    return (boxes - np.tile(corners, 2)) * (size / squares[:, 2:])
