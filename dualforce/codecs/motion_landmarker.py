"""Face motion by MediaPipe: head pose and 52 blendshapes of every pixel frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualforce.codecs.face_landmarker import TAG, Face, FaceLandmarkerModel, check_model_file
from dualforce.codecs.protocols import CodecError, Pixels

# Motion is read from crops of this size, however small the clip: at 128 pixels the scores err by as much as they move.
CROP_SIZE = 256
POSE_NAMES = ("pitch", "yaw", "roll", "tx", "ty", "tz")
_SIDED = (
    "browDown browOuterUp cheekSquint eyeBlink eyeLookDown eyeLookIn eyeLookOut eyeLookUp eyeSquint eyeWide "
    "mouthDimple mouthFrown mouthLowerDown mouthPress mouthSmile mouthStretch mouthUpperUp noseSneer"
)
_SINGLE = (
    "_neutral browInnerUp cheekPuff jawForward jawLeft jawOpen jawRight mouthClose mouthFunnel mouthLeft mouthPucker "
    "mouthRight mouthRollLower mouthRollUpper mouthShrugLower mouthShrugUpper"
)
# The model lists its scores in alphabetical order.
BLENDSHAPE_NAMES = tuple(
    sorted(_SINGLE.split() + [name + side for name in _SIDED.split() for side in ("Left", "Right")])
)


class NoFaceError(ValueError):
    """No face was found in a pixel frame whose motion is needed."""

    def __init__(self, frame: int) -> None:
        super().__init__(f"no face in pixel frame {frame}")
        self.frame = frame


class LandmarkerMotion:
    """Motion [P,58] fp32: pitch, yaw, roll (degrees), head position x, y, z (centimetres, camera space) and the 52
    blendshape scores of MediaPipe's FaceLandmarker. A frame without a face raises NoFaceError; nothing is filled in."""

    tag = TAG
    names = POSE_NAMES + BLENDSHAPE_NAMES
    width = len(names)

    def __init__(self, model: Path) -> None:
        check_model_file(model)
        self._model = model

    def encode(self, pixels: Pixels, fps: float) -> Tensor:
        """Motion of consecutive pixel frames [P,H,W,3] uint8 at `fps`, best square crops of CROP_SIZE.

        The face is tracked from frame to frame, starting afresh with every call. Raises NoFaceError, or CodecError when
        the model file is another one.
        """
        rows = np.empty((len(pixels), self.width))
        with FaceLandmarkerModel(self._model, video=True) as landmarker:
            for index, picture in enumerate(pixels):
                faces = landmarker.faces(picture, round(index * 1000 / fps))
                if not faces:
                    raise NoFaceError(index)
                rows[index] = self._row(faces[0])
        return torch.from_numpy(rows).float()

    def _row(self, face: Face) -> NDArray[np.float64]:
        if face.names != BLENDSHAPE_NAMES:
            raise CodecError(f"{self._model}: blendshapes {face.names[:3]}...: expected the 52 of tag {TAG}")
        return np.concatenate([euler_degrees(face.matrix), face.matrix[:3, 3], face.scores])


def euler_degrees(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """(pitch, yaw, roll) in degrees of R = Rz(roll) Ry(yaw) Rx(pitch), the upper left 3x3 of `matrix` up to scale."""
    rotation = matrix[:3, :3] / np.cbrt(np.linalg.det(matrix[:3, :3]))
    pitch = np.arctan2(rotation[2, 1], rotation[2, 2])
    yaw = np.arctan2(-rotation[2, 0], np.hypot(rotation[2, 1], rotation[2, 2]))
    roll = np.arctan2(rotation[1, 0], rotation[0, 0])
    return np.degrees(np.array([pitch, yaw, roll]))
