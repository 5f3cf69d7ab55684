"""Face boxes of a sidecar that cannot be of the picture: a reason in one line, no gigabytes and no crop of nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.clips import sidecar_json, write_sidecar
from helpers.odd_videos import FRAMES, make

from dualforce.codecs.motion_sidecar import Motion, Sidecar
from dualforce.preprocess.face_track import track_sidecar
from dualforce.preprocess.job import Job
from dualforce.preprocess.process import process_video
from dualforce.preprocess.quality import Limits
from dualforce.preprocess.reasons import Rejected

WRONG = {
    "huge": [0.0, 0.0, 1e9, 1e9],
    "far": [1e12, 1e12, 1e12 + 1e6, 1e12 + 1e6],
    "all-numbers": [-1.7e308, -1.7e308, 1.7e308, 1.7e308],
    "beside": [70.0, 10.0, 90.0, 40.0],
    "above": [10.0, -40.0, 40.0, -1.0],
    "three-times-as-wide": [-64.0, 10.0, 128.0, 60.0],
}
RIGHT = ([16.0, 16.0, 48.0, 48.0], [-20.0, 10.0, 30.0, 70.0], [-30.0, -30.0, 94.0, 94.0])


@pytest.mark.parametrize("name", WRONG)
def test_boxes_that_are_of_no_picture(name: str, tmp_path: Path) -> None:
    """In one pixel frame only."""
    make(tmp_path / "a.mp4")
    boxes = [[16.0, 16.0, 48.0, 48.0]] * FRAMES
    boxes[5] = WRONG[name]
    write_sidecar(tmp_path / "a.mp4", sidecar_json(FRAMES, face_boxes=boxes))
    job = Job(tmp_path / "a.mp4", "a", "k", "who", "", 0, 16, Limits(), tmp_path / "a.json", None, tmp_path)
    (entry,) = process_video(job).rejected
    assert entry["reason"] == "E_SIDECAR" and entry["detail"].startswith("face_boxes[5]: [")
    assert entry["detail"].endswith("expected a face in a picture of 64 x 64")


@pytest.mark.parametrize("box", RIGHT, ids=str)
def test_boxes_that_reach_out_of_the_picture_are_faces(box: list[float]) -> None:
    boxes = np.array([box] * 3)
    sidecar = Sidecar("who", None, Motion("test-v1", (), np.zeros((3, 0))), boxes, 0.0)  # type: ignore[arg-type]
    assert (track_sidecar(3, (64, 64), sidecar).boxes == boxes).all()
    with pytest.raises(Rejected, match=r"E_SIDECAR: face_boxes\[0\]: "):
        track_sidecar(3, (16, 8), sidecar)
