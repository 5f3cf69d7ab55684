"""Are eyes and mouth inside the crop? Measured with landmarks of the source pictures, not of the crops."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import mediapipe
import numpy as np
from mediapipe.tasks.python import BaseOptions, vision

from data_shards.reader import ShardSet
from dualforce.codecs.media import iter_frames

EYES_AND_MOUTH = sorted(
    {
        point
        for part in ("LEFT_EYE", "RIGHT_EYE", "LIPS")
        for line in getattr(vision.FaceLandmarksConnections, f"FACE_LANDMARKS_{part}")
        for point in (line.start, line.end)
    }
)


class Inside(NamedTuple):
    """Pixel frames looked at, those without a face in the source picture, and the share with all points inside."""

    frames: int
    faceless: int
    share: float
    margin: float  # smallest distance of a point from the crop's edge over all frames, as a share of the crop


def crop_boxes(shards: Path, source: str) -> dict[int, np.ndarray]:
    """Crop box (x0, y0, x1, y1) in source pixels by pixel frame, of all samples of one video."""
    opened = ShardSet.open(shards)
    found = {}
    for split in ("train", "validation"):
        for index in range(len(opened.split(split))):
            meta = opened.split(split).read(index).meta
            if meta["source"] == source:
                first = meta["first_pixel_frame"]
                found |= {first + k: np.array(box) for k, box in enumerate(meta["crop"]["boxes"])}
    return found


def inside_share(video: Path, boxes: dict[int, np.ndarray], model: Path, step: int = 1) -> Inside:
    """Look at every `step`-th pixel frame of those with a box. A frame without a face counts as not inside."""
    options = vision.FaceLandmarkerOptions(base_options=BaseOptions(model_asset_path=str(model)))
    frames = faceless = good = 0
    margin = np.inf
    with vision.FaceLandmarker.create_from_options(options) as landmarker:
        for index, picture in iter_frames(video, step=step):
            if index not in boxes:
                continue
            frames += 1
            image = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=np.ascontiguousarray(picture))
            faces = landmarker.detect(image).face_landmarks
            if not faces:
                faceless += 1
                continue
            size = np.array(picture.shape[1::-1])
            points = np.array([(faces[0][k].x, faces[0][k].y) for k in EYES_AND_MOUTH]) * size
            low, high = boxes[index][:2], boxes[index][2:]
            distance = min((points - low).min(), (high - points).min()) / (high - low)[0]
            good += int(distance >= 0)
            margin = min(margin, float(distance))
    return Inside(frames, faceless, good / max(1, frames), margin)
