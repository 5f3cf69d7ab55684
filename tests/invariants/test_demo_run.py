"""The demo on the bundled sample, from videos to a generated video, as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_shards.reader import ShardSet
from dualforce.codecs.media import read_audio, read_video
from dualforce.codecs.registry import video_codec
from dualforce.weights.load import load_model

ROOT = Path(__file__).resolve().parents[2]

# One launch of minutes; the limit is for a machine that is several times slower.
pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    done = subprocess.run(
        [sys.executable, "-m", "tools.demo", "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=1700
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def summary(demo: Path) -> dict[str, Any]:
    return json.loads((demo / "summary.json").read_text())


def test_layout(demo: Path) -> None:
    for name in (
        "shards/manifest.json", "run/checkpoints/LATEST", "run/tensorboard", "run/metrics.jsonl", "run/config.json",
        "model/config.json", "model/model.safetensors", "model/README.md", "sample.mp4", "summary.json",
    ):  # fmt: skip
        assert (demo / name).exists(), name


def test_training_learns_what_carries_over_to_new_faces(summary: dict[str, Any]) -> None:
    """An untrained model predicts zero: about 2. The best linear predictor is what needs no training; 15 % below it on
    identities never trained on means that the model reads the reference, the neighbours or the sound."""
    loss = summary["validation_video_loss"]
    assert 1.7 < loss["untrained"] < 2.3
    assert 1.4 < loss["best_linear_predictor"] < 1.7
    assert loss["trained"] <= 0.85 * loss["best_linear_predictor"], loss


def test_summary_counts_and_times(summary: dict[str, Any]) -> None:
    assert summary["counts"]["train"] == {"samples": 16, "identities": 16}
    assert summary["counts"]["validation"] == {"samples": 4, "identities": 4}
    assert summary["counts"]["rejected"] == []
    assert {"shards", "train", "export", "generate"} <= summary["seconds"].keys()
    assert summary["losses"]["first_validation"]["step"] == 0
    assert summary["losses"]["last_validation"]["step"] > 0


def test_tensorboard_has_the_curves_and_pictures(demo: Path) -> None:
    board = EventAccumulator(str(demo / "run" / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    board.Reload()
    tags = board.Tags()
    for name in ("video", "struct", "lip_sync", "total", "grad_norm", "learning_rate", "tokens_per_second",
                 "seconds_per_step", "data_wait", "video_by_sigma/0", "struct_by_sigma/9"):  # fmt: skip
        assert f"train/{name}" in tags["scalars"], name
    assert "validation/frames" in tags["images"]


def test_generated_video_has_the_length_and_the_driving_sound(demo: Path) -> None:
    assert len(read_video(demo / "sample.mp4").frames) == 81
    driving, heard = read_audio(demo / "work" / "audio.wav"), read_audio(demo / "sample.mp4")
    count = min(len(driving), len(heard))
    assert count > 3 * 16_000
    # AAC keeps the waveform up to coding noise and, in some decoders, a delay of whole frames of 1024 samples.
    delays = [np.corrcoef(driving[: count - d], heard[d:count])[0, 1] for d in (0, 1024, 2048)]
    assert max(delays) > 0.9


def test_generated_face_is_that_of_the_given_picture(demo: Path) -> None:
    """Frames after the first are nearer to the driving identity's true clip than to any other held-out clip."""
    model, config = load_model(demo / "model", torch.device("cpu"), torch.float32)
    assert model.config.preset == "tiny"
    codec = video_codec(config["extractors"]["video"]["tag"])
    held_out = ShardSet.open(demo / "shards").split("validation")
    clips = [np.asarray(codec.decode(held_out.read(i).video.float())) for i in range(len(held_out))]
    made = read_video(demo / "sample.mp4").frames.astype(np.float64)
    first = [np.abs(made[0] - clip[0]).mean() for clip in clips]
    later = [np.abs(made[40:] - clip[40:81]).mean() for clip in clips]
    assert int(np.argmin(later)) == int(np.argmin(first)), (first, later)
