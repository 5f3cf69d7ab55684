"""Building with insightface's detector: crops follow its boxes, motion comes from where it came before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("insightface")

from helpers.blob_detector import blob_detector
from helpers.clips import sidecar_json, textured, tone, write_sidecar

from data_shards.reader import ShardSet
from data_shards.schema import ClipSample
from dualforce.codecs.face_box import face_squares, square_boxes
from dualforce.codecs.face_retina import RetinaFaceModel
from dualforce.codecs.media import iter_frames, read_video, write_video
from dualforce.codecs.protocols import CodecError
from dualforce.preprocess.build import BuildOptions, build_shards
from dualforce.preprocess.face_track import track_faces

FRAMES = 85
STILL = (90.0, 80.0, 146.0, 152.0)  # the red rectangle, in a picture where the sidecar says the face is elsewhere


@pytest.fixture(scope="module")
def detector_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blob_detector(tmp_path_factory.mktemp("detector") / "det_test.onnx")


def grey(frames: int = FRAMES, seed: int = 0, size: int = 192) -> np.ndarray:
    """Moving grey textures: nothing red."""
    return np.repeat(textured(frames, size, seed)[..., :1] // 2, 3, axis=-1)


def paint(frames: np.ndarray, box: tuple[float, ...]) -> np.ndarray:
    x0, y0, x1, y1 = map(int, box)
    frames[:, y0:y1, x0:x1] = (255, 0, 0)
    return frames


def clip(path: Path, frames: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, frames, tone(len(frames) + 2))
    write_sidecar(path, sidecar_json(len(frames), identity=path.stem))
    return path


def samples(out: Path) -> list[ClipSample]:
    splits = [ShardSet.open(out).split(name) for name in ("train", "validation")]
    return [split.read(index) for split in splits for index in range(len(split))]


def test_track_of_a_moving_face_in_source_pixels(tmp_path: Path, detector_file: Path) -> None:
    """A wide picture, shrunk for the search; a second face as large now and then, and no face at the end."""
    frames = np.full((31, 540, 1440, 3), 70, np.uint8)
    for k in range(26):
        paint(frames[k : k + 1], (300 + 8 * k, 100, 420 + 8 * k, 250))
        if k in (10, 11):
            paint(frames[k : k + 1], (900, 300, 990, 390))
    write_video(tmp_path / "v.mp4", frames, None)
    finder = RetinaFaceModel(detector_file)
    track = track_faces(tmp_path / "v.mp4", finder)
    finder.close()
    assert track.finder.tag == finder.tag and track.frames == 31
    assert track.times.tolist() == [0, 5, 10, 15, 20, 25, 30]
    assert track.found.tolist() == [True] * 6 + [False]
    truth = np.array([(300 + 8 * k, 100, 420 + 8 * k, 250) for k in range(0, 26, 5)])
    assert np.abs(track.boxes[:6] - truth).max() <= 3
    assert track.rivals.tolist() == [False, False, True, False, False, False, False]


def test_rendered_clips_are_cropped_where_the_detector_says(tmp_path: Path, detector_file: Path) -> None:
    clip(tmp_path / "clips" / "a.mp4", paint(grey(seed=1), STILL))
    clip(tmp_path / "clips" / "b.mp4", paint(grey(seed=6), STILL))  # 2 and 3 are so soft that they look like dissolves
    clip(tmp_path / "clips" / "none.mp4", grey(seed=7))
    two = paint(grey(seed=4), STILL)
    clip(tmp_path / "clips" / "two.mp4", paint(two, (10, 10, 60, 70)))
    write_sidecar(clip(tmp_path / "clips" / "rows.mp4", paint(grey(seed=5), STILL)), sidecar_json(FRAMES - 1))
    options = BuildOptions(size=64, face_detector=detector_file.parent, validation_share=0.5)
    manifest = build_shards(tmp_path / "clips", tmp_path / "out", options).manifest
    assert {(entry["source"], entry["reason"]) for entry in manifest["rejected"]} == {
        ("none.mp4", "R_NOFACE"), ("two.mp4", "R_MULTIFACE"), ("rows.mp4", "E_SIDECAR"),
    }  # fmt: skip
    tag = RetinaFaceModel(detector_file).tag
    assert manifest["info"]["face_detector"] == tag
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "non-commercial" in report["origins"][tag] and "Apache-2.0" in report["origins"]["dct-4x8x8-16-v1"]
    assert f"<td>{tag}</td><td>{report['origins'][tag]}</td>" in (tmp_path / "out" / "report.html").read_text()
    assert manifest["extractors"]["motion"]["tag"] == "test-v1"
    wanted = square_boxes(face_squares(np.array([STILL])))[0]
    found = samples(tmp_path / "out")
    assert len(found) == 2
    for sample in found:
        assert sample.meta["finders"]["faces"]["tag"] == tag and sample.meta["tags"]["motion"] == "test-v1"
        assert np.abs(np.array(sample.meta["crop"]["boxes"]) - wanted).max() <= 3
        assert torch.allclose(sample.struct[1, :, 0], torch.tensor([0.1, 0.2, 0.3, 0.4]))  # the sidecar's


def test_without_a_detector_the_manifest_names_none(tmp_path: Path) -> None:
    clip(tmp_path / "clips" / "a.mp4", grey(seed=1))
    manifest = build_shards(tmp_path / "clips", tmp_path / "out", BuildOptions(size=64)).manifest
    assert "face_detector" not in manifest["info"]


def test_a_detector_that_cannot_be_used_is_said_before_the_work(tmp_path: Path) -> None:
    clip(tmp_path / "clips" / "a.mp4", grey(seed=1))
    (tmp_path / "models").mkdir()
    with pytest.raises(CodecError, match="models: holds nothing: expected det_"):
        build_shards(tmp_path / "clips", tmp_path / "out", BuildOptions(size=64, face_detector=tmp_path / "models"))
    assert not list((tmp_path / "out").iterdir())


def test_a_detector_that_changes_during_the_build_is_not_mixed_in(
    tmp_path: Path, detector_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dualforce.preprocess import build

    mine = shutil.copy(detector_file, tmp_path / "det_10g.onnx")
    clip(tmp_path / "clips" / "a.mp4", paint(grey(seed=1), STILL))
    run = build.run_tasks

    def swapped(*arguments):
        blob_detector(mine, scale=1.1)
        return run(*arguments)

    monkeypatch.setattr(build, "run_tasks", swapped)
    with pytest.raises(build.BuildError, match=r"is 'insightface-detector-.*': expected 'insightface-detector-"):
        build_shards(tmp_path / "clips", tmp_path / "out", BuildOptions(size=64, face_detector=mine))


def test_motion_of_the_crops_is_the_landmarkers(
    tmp_path: Path, clips_dir: Path, landmarker_file: Path, detector_file: Path
) -> None:
    """A real face, in grey, above a red bar: the detector's box is the bar, the crop around it holds the whole picture,
    and the landmarker reads motion from that crop."""
    source = clips_dir / "video" / "may_5s.mp4"
    height, width = next(iter_frames(source))[1].shape[:2]
    bar = (width // 6, height - 56, width - width // 6, height - 28)
    video = read_video(source, stop=FRAMES)
    assert video.sound is not None
    (tmp_path / "clips").mkdir()
    grey_video = np.repeat(video.frames.mean(axis=-1, keepdims=True).astype(np.uint8), 3, axis=-1)
    write_video(tmp_path / "clips" / "a.mp4", paint(grey_video, bar), video.sound.wave)
    options = BuildOptions(size=64, face_landmarker=landmarker_file, face_detector=detector_file)
    manifest = build_shards(tmp_path / "clips", tmp_path / "out", options).manifest
    assert manifest["extractors"]["motion"]["tag"] == "mediapipe-face-landmarker-v1" and not manifest["rejected"]
    (sample,) = samples(tmp_path / "out")
    wanted = square_boxes(face_squares(np.array([bar], np.float64)))[0]
    assert np.abs(np.array(sample.meta["crop"]["boxes"]) - wanted).max() <= 6
    assert sample.meta["finders"]["faces"]["tag"] == manifest["info"]["face_detector"]
    assert sample.meta["not_judged"] == ["yaw_rate"]  # the detector does not see it
    assert sample.struct.shape == (21, 4, 58) and float(sample.struct.std(dim=(0, 1)).max()) > 0.1
