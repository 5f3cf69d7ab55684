"""Motion by MediaPipe and from sidecars; the registry of tags."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.clips import sidecar_json

from dualforce.codecs import audio_logmel, motion_landmarker, video_dct
from dualforce.codecs.face_landmarker import FaceLandmarkerModel
from dualforce.codecs.media import read_video
from dualforce.codecs.motion_landmarker import LandmarkerMotion, NoFaceError, euler_degrees
from dualforce.codecs.motion_sidecar import SidecarError, find_sidecar, read_motion, read_sidecar
from dualforce.codecs.protocols import CodecError
from dualforce.codecs.registry import audio_encoder, motion_encoder, video_codec


def rotation(axis: int, degrees: float) -> np.ndarray:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    matrix = np.eye(4)
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    matrix[i, i] = matrix[j, j] = c
    matrix[i, j], matrix[j, i] = -s, s
    return matrix


def test_euler_angles_of_a_known_rotation() -> None:
    matrix = rotation(2, 5) @ rotation(1, -20) @ rotation(0, 12)
    matrix[:3, :3] *= 1.3
    assert np.allclose(euler_degrees(matrix), [12, -20, 5])


def test_landmarker_on_a_real_face(clips_dir: Path, landmarker_file: Path) -> None:
    frames = read_video(clips_dir / "video" / "man_interview_6s.mp4", stop=12).frames
    encoder = LandmarkerMotion(landmarker_file)
    motion = encoder.encode(frames, 25)
    assert motion.shape == (12, 58) and motion.dtype == torch.float32 and len(encoder.names) == 58
    yaw = motion[:, encoder.names.index("yaw")]
    assert ((yaw > 5) & (yaw < 20)).all()  # the clip's manifest says 8.6 to 16.0
    scores = motion[:, 6:]
    assert (scores >= 0).all() and (scores <= 1).all() and (motion.std(dim=0) > 0).sum() > 50
    assert torch.equal(encoder.encode(frames, 25), motion)  # nothing is remembered between calls


def test_a_missing_face_is_an_error_and_names_the_frame(clips_dir: Path, landmarker_file: Path) -> None:
    frames = read_video(clips_dir / "video" / "man_interview_6s.mp4", stop=6).frames
    frames[3:] = 0
    with pytest.raises(NoFaceError, match="pixel frame 3"):
        LandmarkerMotion(landmarker_file).encode(frames, 25)


def test_bad_model_file(tmp_path: Path) -> None:
    with pytest.raises(CodecError, match="no such file"):
        LandmarkerMotion(tmp_path / "none.task")
    wrong = tmp_path / "wrong.task"
    wrong.write_bytes(b"something else")
    with pytest.raises(CodecError, match=r"wrong\.task: not a task file"):
        LandmarkerMotion(wrong)


def test_the_tag_is_of_one_file(landmarker_file: Path, tmp_path: Path) -> None:
    """One that works as well and has other bytes would give other numbers under the same name."""
    other = tmp_path / "other.task"
    other.write_bytes(landmarker_file.read_bytes())
    with zipfile.ZipFile(other, "a") as archive:
        archive.comment = b"another edition"
    with pytest.raises(
        CodecError, match=r"other\.task: sha256 = [0-9a-f]{64}: expected 64184e229b26[0-9a-f]{52}, Media"
    ):
        LandmarkerMotion(other)
    with pytest.raises(CodecError, match=r"other\.task: sha256"):
        FaceLandmarkerModel(other, video=False)


def test_registry(tmp_path: Path) -> None:
    assert video_codec(video_dct.TAG).tag == video_dct.TAG
    assert audio_encoder(audio_logmel.TAG).width == 80
    for look_up in (video_codec, audio_encoder):
        with pytest.raises(CodecError, match="'wan': unknown"):
            look_up("wan")
    with pytest.raises(CodecError, match="no encoder computes it"):
        motion_encoder("rendered-head-v1", None)
    with pytest.raises(CodecError, match="needs --face-landmarker"):
        motion_encoder(motion_landmarker.TAG, None)


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_sidecar_of_a_clip(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", sidecar_json(7))
    sidecar = read_sidecar(path)
    assert sidecar.identity == "someone" and sidecar.motion.names == ("yaw", "mouth")
    assert sidecar.motion.values.shape == (7, 2) and sidecar.face_boxes.shape == (7, 4)
    assert torch.equal(read_motion(path).values, sidecar.motion.values)
    assert find_sidecar(tmp_path / "a.mp4") == path and find_sidecar(tmp_path / "b.mp4") is None


def test_other_json_beside_a_video_is_no_sidecar(tmp_path: Path) -> None:
    write(tmp_path / "a.json", {"title": "metadata of a downloader"})
    write(tmp_path / "b.json", "{ broken")
    write(tmp_path / "c.json", "[" * 100_000)
    (tmp_path / "d.json").write_bytes(b"\xff\xfe{}")
    assert not any(find_sidecar(tmp_path / f"{name}.mp4") for name in "abcd")


def test_a_sidecar_that_was_cut_short_is_refused_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it motion would be read from the pictures, and mean something else."""
    whole = json.dumps(sidecar_json(3))
    for number, text in enumerate((whole[:-9], '{"format": "dualforce-sidecar", "x": ' + "[" * 100_000)):
        path = write(tmp_path / f"{number}.json", text)
        assert find_sidecar(path.with_suffix(".mp4")) == path
        with pytest.raises(SidecarError, match=rf"{number}\.json: not JSON"):
            read_sidecar(path)
    good = write(tmp_path / "good.json", whole)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "denied")))
    assert find_sidecar(good.with_suffix(".mp4")) == good
    with pytest.raises(SidecarError, match=r"good\.json: cannot be read \(.*denied"):
        read_sidecar(good)


def test_a_key_that_a_sidecar_has_twice_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    """Also where the last of two formats is none of ours."""
    whole = json.dumps(sidecar_json(3))
    for number, (more, key) in enumerate((('"fps": 25', "fps"), ('"format": "other"', "format"))):
        path = write(tmp_path / f"{number}.json", f"{whole[:-1]}, {more}}}")
        assert find_sidecar(path.with_suffix(".mp4")) == path
        for read in (read_sidecar, read_motion):
            with pytest.raises(SidecarError, match=rf"{number}\.json: key {key}: given twice: expected once"):
                read(path)


def motion_with(**changes: Any) -> dict[str, Any]:
    return {"motion": sidecar_json(3)["motion"] | changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version: 2: expected 1"),
        ({"fps": 30}, "fps: 30: expected 25"),
        ({"format": "other"}, "format: 'other'"),
        ({"identity": ""}, "identity: ''"),
        ({"identity": "x" * 501}, "identity: 501 characters: expected at most 500"),
        ({"licence": 5}, "licence: 5: expected text"),
        ({"licence": "y" * 5_000_000}, "licence: 5000000 characters: expected at most 500"),
        ({"motion": None}, "motion: 'None'"),
        (motion_with(tag="x" * 201), "motion.tag: 201 characters: expected at most 200"),
        (motion_with(tag=7), "motion.tag: 7"),
        (motion_with(names=["yaw", "x" * 201]), r"motion.names\[1\]: 201 characters: expected at most 200"),
        (motion_with(names=["yaw", "yaw"]), "motion.names: a name occurs twice"),
        (motion_with(values=[]), r"motion.values: '\[\]'"),
        (motion_with(values=[[0, 1], [0], [0, 1]]), r"motion.values\[1\]: 1: expected 2 numbers"),
        (motion_with(values=[[0, 1], [0, "x"], [0, 1]]), r"motion.values\[1\]: 'x': expected a finite number"),
        (motion_with(values=[[0, 1], [0, float("nan")], [0, 1]]), r"motion.values\[1\]: nan"),
        (motion_with(values=[[0, 1], [0, 10**400], [0, 1]]), r"motion.values\[1\]: 10{39}: expected a finite number"),
        ({"face_boxes": [[0, 0, 1, 1]] * 2}, "face_boxes: 2 rows: expected 3"),
        ({"face_boxes": [[5, 0, 1, 1]] * 3}, r"face_boxes\[0\]"),
        ({"audio_offset_s": "late"}, "audio_offset_s"),
    ],
)
def test_bad_sidecar_is_one_line_with_file_key_and_value(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "bad.json", sidecar_json(3, **changes))
    with pytest.raises(SidecarError, match=message) as caught:
        read_sidecar(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["identity", "licence", "version", "fps", "motion"])
def test_a_wrong_value_of_any_size_is_a_short_line(tmp_path: Path, key: str) -> None:
    """It goes into a report, and into the manifest."""
    large = ["x"] * 100_000
    data = sidecar_json(3) | (motion_with(tag=large) if key == "motion" else {key: large})
    with pytest.raises(SidecarError, match=rf"{key}.*: expected ") as error:
        read_sidecar(write(tmp_path / "clip.json", data))
    assert len(str(error.value)) < len(str(tmp_path)) + 150


def test_unreadable_sidecar(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", write(tmp_path / "broken.json", "{")):
        with pytest.raises(SidecarError, match=path.name):
            read_motion(path)
