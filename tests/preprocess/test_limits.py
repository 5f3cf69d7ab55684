"""Every limit has its reason, its figure and its place in a file; figures alone, without videos."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from helpers.clips import textured, tone

from dualforce.config import ConfigError
from dualforce.preprocess.face_track import FaceTrack
from dualforce.preprocess.finder import Finder
from dualforce.preprocess.limits_file import read_limits
from dualforce.preprocess.quality import (
    UNJUDGED,
    Limits,
    check_length,
    check_sharpness,
    check_speech,
    check_window_sound,
    check_yaw,
)
from dualforce.preprocess.reasons import Reason, Rejected
from dualforce.preprocess.scenes import Scene
from dualforce.preprocess.sharpness import sharpness

LIMITS = Limits()


def turned(degrees: list[float]) -> FaceTrack:
    count = len(degrees)
    return FaceTrack(
        Finder("test"), 5 * count, np.arange(count) * 5, np.ones((count, 4)), np.zeros(count, bool), np.array(degrees)
    )


def blurred(pictures: np.ndarray, times: int) -> np.ndarray:
    """Averaged over 3x3 pixels, `times` over."""
    grey = pictures.astype(np.float64)
    for _ in range(times):
        for axis in (1, 2):
            grey = (np.roll(grey, 1, axis) + grey + np.roll(grey, -1, axis)) / 3
    return grey.astype(np.uint8)


def test_clipped_sound() -> None:
    wave = (tone(81) * 4).clip(-1, 1)
    share = float((np.abs(wave) >= 0.9).mean())
    assert 0.02 < share < 0.4
    with pytest.raises(
        Rejected, match=r"R_CLIPPED: \d+\.\d% of the sound at or near full scale: expected at most 2\.0%"
    ):
        check_window_sound(wave, LIMITS)
    figures = check_window_sound(wave, replace(LIMITS, clipped_share=share))
    assert figures["clipped_share"] == pytest.approx(share, abs=1e-5)
    assert figures["window_rms"] == pytest.approx(np.sqrt(np.mean(wave.astype(float) ** 2)), abs=1e-5)
    assert check_window_sound(tone(81), LIMITS)["clipped_share"] == 0


def test_sound_over_full_scale_is_clipped_too() -> None:
    """A lossy codec's decoder overshoots where the original was cut off."""
    with pytest.raises(Rejected, match="R_CLIPPED"):
        check_window_sound(np.full(1000, -1.3, np.float32), LIMITS)


def test_too_quiet_a_window() -> None:
    with pytest.raises(Rejected, match="R_SILENT"):
        check_window_sound(np.full(1000, 5e-5, np.float32), LIMITS)


def test_little_speech() -> None:
    assert check_speech(0.5, LIMITS) == {"speech_share": 0.5}
    with pytest.raises(Rejected, match="R_NOSPEECH: speech in 49% of the window: expected at least 50%"):
        check_speech(0.49, LIMITS)


def test_a_turned_head() -> None:
    straight = [0.0] * 18
    assert check_yaw(turned([*straight, 41.0, -41.0]), LIMITS) == {"yaw_degrees": 41.0, "yaw_rate": 0.1}
    for sign in (1, -1):
        with pytest.raises(Rejected, match=r"R_YAW: .* 40 degrees in 15% of 20 tracked frames, up to 50"):
            check_yaw(turned([*straight[1:], *[sign * 50.0] * 3]), LIMITS)
    # Frames without a face say nothing, and a track without any yaw has no figure.
    assert check_yaw(turned([np.nan, 10.0]), LIMITS) == {"yaw_degrees": 10.0, "yaw_rate": 0.0}
    assert check_yaw(turned([np.nan] * 4), LIMITS) == {}


def test_length_of_a_scene() -> None:
    check_length(Scene(0, 10, 91), LIMITS)
    with pytest.raises(Rejected, match="R_SHORT: 80 pixel frames: expected at least 81"):
        check_length(Scene(0, 10, 90), LIMITS)
    with pytest.raises(Rejected, match="R_SHORT: 99 pixel frames: expected at least 100"):
        check_length(Scene(0, 0, 99), replace(LIMITS, seconds=4.0))
    check_length(Scene(0, 0, 81), replace(LIMITS, seconds=0.0))
    with pytest.raises(Rejected, match="expected at least 81"):
        check_length(Scene(0, 0, 80), replace(LIMITS, seconds=0.0))


def test_sharpness_falls_with_blur_and_not_with_light() -> None:
    rng = np.random.default_rng(0)
    sharp = blurred(rng.integers(0, 255, (6, 256, 256, 3), np.uint8), 1)
    found = [sharpness(blurred(sharp, times)) for times in (0, 1, 3, 9)]
    assert found == sorted(found, reverse=True) and found[0] > 3 * found[3]
    assert sharpness((sharp // 3 + 50).astype(np.uint8)) == pytest.approx(found[0], rel=0.05)
    assert sharpness(np.full((6, 256, 256, 3), 90, np.uint8)) == 0.0


def test_sharpness_is_that_of_the_face_not_of_what_is_behind_it() -> None:
    rng = np.random.default_rng(1)
    smooth, busy = textured(6, 256), rng.integers(0, 255, (6, 256, 256, 3), np.uint8)
    behind = busy.copy()
    behind[:, 70:220, 60:196] = smooth[:, 70:220, 60:196]
    assert sharpness(behind) == pytest.approx(sharpness(smooth))
    with pytest.raises(Rejected, match=r"R_BLUR: sharpness 0\.\d\d of the face: expected at least 0\.50"):
        check_sharpness(behind, LIMITS)
    assert check_sharpness(busy, LIMITS)["sharpness"] > 1


def test_small_crops_are_not_judged_in_silence() -> None:
    crops = textured(6, 128)
    assert check_sharpness(crops, replace(LIMITS, sharpness=0.0)) == {}
    with pytest.raises(ValueError, match="crops of 128: too small"):
        check_sharpness(crops, LIMITS)


def test_rendered_clips_are_exempt_unless_asked_for() -> None:
    lenient = LIMITS.for_rendered()
    changed = {f.name for f in fields(Limits) if getattr(lenient, f.name) != getattr(LIMITS, f.name)}
    assert changed == set(UNJUDGED)
    check_speech(0.0, lenient)
    check_yaw(turned([90.0]), lenient)
    assert replace(LIMITS, judge_rendered=True).for_rendered() == replace(LIMITS, judge_rendered=True)


def test_file_of_limits(tmp_path: Path) -> None:
    path = tmp_path / "limits.json"
    path.write_text("{}")
    assert read_limits(path) == LIMITS
    path.write_text(json.dumps({"speech_share": 0, "yaw_degrees": 25, "judge_rendered": True}))
    assert read_limits(path) == replace(LIMITS, speech_share=0, yaw_degrees=25, judge_rendered=True)
    every = {field.name: getattr(LIMITS, field.name) for field in fields(Limits)}
    path.write_text(json.dumps(every))
    assert read_limits(path) == LIMITS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"sharpnes": 0.4}', "unknown key 'sharpnes': did you mean sharpness?"),
        ('{"zzz": 0.4}', "unknown key 'zzz': expected one of seconds, face_rate,"),
        ('{"speech_share": "0.5"}', "speech_share: '0.5': expected a number from 0 to 1"),
        ('{"speech_share": 1.01}', "speech_share: '1.01': expected a number from 0 to 1"),
        ('{"speech_share": -0.1}', "speech_share: '-0.1': expected a number from 0 to 1"),
        ('{"speech_share": true}', "speech_share: 'True': expected a number"),
        ('{"yaw_degrees": NaN}', "yaw_degrees: 'nan': expected a number from 0 to 180"),
        ('{"seconds": Infinity}', "seconds: 'inf': expected a number from 0 to 3600"),
        ('{"seconds": null}', "seconds: 'None': expected a number"),
        ('{"face_rate": ' + "9" * 400 + "}", "face_rate: '9999"),
        ('{"judge_rendered": 1}', "judge_rendered: '1': expected true or false"),
        ('{"yaw_degrees": 9, "yaw_degrees": 8}', "key yaw_degrees: given twice: expected once"),
        ("[]", "expected a JSON object, found list"),
        ("{", "not JSON, line 1"),
    ],
)
def test_wrong_files_of_limits_are_one_line(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "limits.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_limits(path)
    text = str(caught.value)
    assert text.startswith(f"--limits {path}: ") and message in text and "\n" not in text and len(text) < 400


def test_missing_file_of_limits(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_limits(tmp_path / "none.json")


def test_every_reason_is_in_the_documentation() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text()
    for name in (*Reason, *(field.name for field in fields(Limits))):
        assert f"`{name}`" in text, name
