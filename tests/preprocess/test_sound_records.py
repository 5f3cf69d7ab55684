"""What sound a video had before it became 16 kHz mono stands in its samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.clips import sidecar_json, write_sidecar
from helpers.odd_videos import FRAMES, SIZE, make

from dualforce.preprocess.job import Job
from dualforce.preprocess.process import process_video
from dualforce.preprocess.quality import Limits
from dualforce.preprocess.sample_file import load_sample

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stereo.mp4": ({}, {"codec": "aac", "hz": 44_100, "channels": 2}),
    "5.1.mp4": ({"layout": "5.1", "hz": 48_000}, {"codec": "aac", "hz": 48_000, "channels": 6}),
    "8-khz.mkv": (
        {"sound": "pcm_s16le", "layout": "mono", "hz": 8000},
        {"codec": "pcm_s16le", "hz": 8000, "channels": 1},
    ),
    "as-it-is.mkv": (
        {"sound": "pcm_s16le", "layout": "mono", "hz": 16_000},
        {"codec": "pcm_s16le", "hz": 16_000, "channels": 1},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_samples_say_what_the_sound_was(name: str, tmp_path: Path) -> None:
    options, expected = CASES[name]
    make(tmp_path / name, **options)
    box = [SIZE[0] / 4, SIZE[1] / 4, 3 * SIZE[0] / 4, 3 * SIZE[1] / 4]
    write_sidecar(tmp_path / name, sidecar_json(FRAMES, face_boxes=[box] * FRAMES))
    sidecar = (tmp_path / name).with_suffix(".json")
    outcome = process_video(Job(tmp_path / name, name, "key", "who", "", 0, 16, Limits(), sidecar, None, tmp_path))
    assert load_sample(outcome.samples[0]).meta["file"]["sound"] == expected
