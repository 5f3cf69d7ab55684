"""One small picture of a video, for the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from dualforce.codecs.face_box import Pixels, square_crop
from dualforce.codecs.media import encode_jpeg, iter_frames
from dualforce.preprocess.job import Job, Outcome
from dualforce.preprocess.reasons import Reason

SIDE = 128
LOOK = 25  # pixel frames: many videos start with black
# Of files that break libraries nothing more is asked than the stages did.
UNSEEN = frozenset((Reason.E_DECODE, Reason.E_INTERNAL, Reason.E_CRASH))


def thumbnail(job: Job, outcome: Outcome) -> bytes | None:
    """JPEG of the first sample's first crop, or of a picture one second into a rejected video; None where there is no
    picture to be had."""
    if not outcome.samples and any(entry["reason"] in UNSEEN for entry in outcome.rejected):
        return None
    try:
        picture = _crop(job.video, outcome.samples[0]) if outcome.samples else _frame(job.video)
        return None if picture is None else encode_jpeg(picture)
    except Exception:
        # The video is done with, and the report says where it has no picture: nothing that a decoder makes of the file
        # a second time may undo the first.
        return None


def _crop(video: Path, stem: Path) -> Pixels | None:
    meta = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))["meta"]
    x0, y0, x1, y1 = meta["crop"]["boxes"][0]
    for index, picture in iter_frames(video):
        if index == meta["first_pixel_frame"]:
            return square_crop(picture, np.array([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0]), SIDE)
    return None


def _frame(video: Path) -> Pixels | None:
    picture = None
    for index, found in iter_frames(video, max_side=SIDE, step=LOOK):
        picture = found
        if index >= LOOK:
            break
    return picture
