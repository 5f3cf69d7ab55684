"""The demo's own parts: what it refuses, what it replaces, what it hands to the generation, how it sums up."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualforce.codecs.media import read_audio, read_image
from dualforce.codecs.motion_sidecar import read_motion, read_sidecar
from tools import demo, demo_inputs, demo_summary


def options(tmp_path: Path, **changes: Any) -> Namespace:
    videos = tmp_path / "videos"
    videos.mkdir(exist_ok=True)
    (videos / "a.mp4").touch()
    values = {"videos": videos, "out": tmp_path / "out", "face_landmarker": None, "steps": None, "workers": 2}
    return Namespace(**values | changes)


def test_right_options_pass(tmp_path: Path) -> None:
    demo.check(options(tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"videos": Path("nowhere")}, "--videos nowhere: expected a folder"),
        ({"face_landmarker": Path("nothing.task")}, "--face-landmarker nothing.task: no such file"),
        ({"steps": 0}, "--steps 0: expected at least 1"),
    ],
)
def test_wrong_options_are_refused_before_any_work(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(demo.DemoError, match=words):
        demo.check(options(tmp_path, **changes))


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "run").mkdir(parents=True)
    (out / "run" / "thesis.txt").write_text("precious")
    with pytest.raises(demo.DemoError, match="not the output of an earlier demo"):
        demo.clear(out, tmp_path)
    assert (out / "run" / "thesis.txt").read_text() == "precious"


def test_earlier_demo_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"
    demo.clear(out, tmp_path / "videos")
    (out / "shards").mkdir()
    (out / "sample.mp4").touch()
    (out / "notes.txt").touch()
    demo.clear(out, tmp_path / "videos")
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt", "work"]


def test_videos_inside_the_output_are_not_deleted(tmp_path: Path) -> None:
    out = tmp_path / "out"
    demo.clear(out, tmp_path / "videos")
    clip = out / "work" / "a.mp4"
    clip.touch()
    with pytest.raises(demo.DemoError, match="lies inside"):
        demo.clear(out, clip.parent)
    assert clip.exists()


def test_failing_stage_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    stages = demo.Stages(demo.Console(), total=1)
    with pytest.raises(demo.DemoError, match="stage train ended with exit code 3"):
        stages.command("train", "train", lambda: 3)


def test_sample_needs_no_landmark_model(tmp_path: Path, sample_dir: Path) -> None:
    assert demo.face_landmarker(options(tmp_path, videos=sample_dir)) is None


def test_picture_and_sound_files_are_read_back(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    path.write_bytes(demo_inputs.png(picture))
    assert np.array_equal(read_image(path), picture)
    sound = np.sin(np.arange(1600, dtype=np.float32) / 20).astype(np.float32)
    demo_inputs.write_wav(tmp_path / "a.wav", sound)
    assert np.abs(read_audio(tmp_path / "a.wav") - sound).max() < 1e-3


def test_motion_file_is_one_row_of_the_sidecar(tmp_path: Path, sample_dir: Path) -> None:
    video = sorted(sample_dir.glob("*.mp4"))[0]
    path = demo_inputs.write_motion(tmp_path / "motion.json", video, 7)
    motion, truth = read_motion(path), read_sidecar(video.with_suffix(".json")).motion
    assert motion.tag == truth.tag and motion.names == truth.names
    assert motion.values.tolist() == truth.values[7:8].tolist()


def write_results(out: Path, rows: list[dict[str, Any]], held_out: int = 2) -> None:
    (out / "shards").mkdir(parents=True)
    (out / "run").mkdir()
    split = {"samples": 3, "identities": ["a", "b"]}
    splits = {"train": split, "validation": {"samples": held_out, "identities": ["c"][:held_out]}}
    (out / "shards" / "manifest.json").write_text(json.dumps({"splits": splits, "rejected": []}))
    (out / "run" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(step: int, video: float, kind: str = "validation") -> dict[str, Any]:
    return {"kind": kind, "step": step, "video": video, "video_linear": 1.5, "video_zero": 2.0}


def test_summary_has_the_three_losses_of_the_first_and_last_validation(tmp_path: Path) -> None:
    write_results(tmp_path, [row(0, 2.0), row(5, 1.9, "train"), row(10, 1.7), row(20, 1.2)])
    summary = demo_summary.summarise(tmp_path, tmp_path, {"shards": 1.0, "train": 2.04})
    loss = summary["validation_video_loss"]
    assert (loss["untrained"], loss["best_linear_predictor"], loss["trained"]) == (2.0, 1.5, 1.2)
    assert loss["below_best_linear_predictor"] == pytest.approx(0.2)
    assert summary["losses"]["last_validation"]["step"] == 20
    assert summary["counts"]["train"] == {"samples": 3, "identities": 2}
    assert summary["seconds"]["train"] == 2.0


def test_summary_without_a_last_validation_is_refused(tmp_path: Path) -> None:
    write_results(tmp_path, [row(0, 2.0), row(5, 1.9, "train")])
    with pytest.raises(demo_summary.SummaryError, match=r"validations at steps \[0\]"):
        demo_summary.summarise(tmp_path, tmp_path, {})


def test_one_identity_has_no_held_out_loss(tmp_path: Path) -> None:
    write_results(tmp_path, [row(5, 1.9, "train")], held_out=0)
    assert demo_summary.summarise(tmp_path, tmp_path, {})["validation_video_loss"] is None
