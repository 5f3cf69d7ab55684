"""Crop track, checks, windows and features on made-up tracks and sounds, where the right answer is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.clips import tone

from dualforce.codecs.audio_logmel import LogMelAudio
from dualforce.codecs.face_box import square_boxes
from dualforce.codecs.media_clock import PlacedSound
from dualforce.codecs.motion_sidecar import Motion
from dualforce.codecs.protocols import Samples
from dualforce.preprocess import features
from dualforce.preprocess.face_crop import plan_crop
from dualforce.preprocess.face_track import FaceTrack
from dualforce.preprocess.finder import Finder
from dualforce.preprocess.quality import Limits, check_faces, check_sound
from dualforce.preprocess.reasons import Reason, Rejected
from dualforce.preprocess.scenes import Scene
from dualforce.preprocess.windows import Window, check_window, plan_windows

LIMITS = Limits()


def track(centres: np.ndarray, side: float = 100.0, frames: int | None = None) -> FaceTrack:
    """Faces of the given size looked at every fifth pixel frame; a NaN centre is a missed face."""
    half = side / 2
    boxes = np.concatenate([centres - half, centres + half], axis=1)
    times = np.arange(len(boxes)) * 5
    none = np.zeros(len(boxes), np.bool_)
    return FaceTrack(Finder("test"), frames or int(times[-1]) + 1, times, boxes, none, np.full(len(boxes), np.nan))


def whole(track: FaceTrack) -> list[Scene]:
    return [Scene(0, 0, track.frames)]


def still(count: int = 40) -> np.ndarray:
    return np.full((count, 2), 200.0)


def test_a_nearly_still_face_gets_a_still_crop() -> None:
    rng = np.random.default_rng(0)
    faces = track(still() + rng.normal(0, 3, (40, 2)))
    crop = plan_crop(faces, whole(faces))
    assert crop.squares.shape == (196, 3) and not crop.cuts
    assert (np.ptp(crop.squares, axis=0) == 0).all()
    assert abs(crop.squares[0, 2] - 200) < 1


def test_a_moving_face_is_followed_smoothly_and_stays_inside() -> None:
    rng = np.random.default_rng(1)
    path = still(60) + np.stack([np.linspace(0, 300, 60), 40 * np.sin(np.arange(60) / 8)], axis=1)
    faces = track(path + rng.normal(0, 2, path.shape))
    crop = plan_crop(faces, whole(faces))
    boxes = square_boxes(crop.squares)[faces.times]
    assert (boxes[:, :2] <= faces.boxes[:, :2] + 1e-9).all() and (boxes[:, 2:] >= faces.boxes[:, 2:] - 1e-9).all()
    raw = np.abs(np.diff(np.interp(np.arange(faces.frames), faces.times, faces.boxes[:, 0]), n=2)).max()
    assert np.abs(np.diff(crop.squares[:, 0], n=2)).max() < raw / 5  # much smoother than the track


def test_missed_faces_are_bridged() -> None:
    centres = still() + np.arange(40)[:, None]
    centres[10:13] = np.nan
    faces = track(centres, frames=204)
    crop = plan_crop(faces, whole(faces))
    assert crop.squares.shape == (204, 3) and np.isfinite(crop.squares).all()


def test_a_jump_is_a_cut_with_a_crop_on_either_side() -> None:
    centres = still()
    centres[20:] += 150
    faces = track(centres)
    crop = plan_crop(faces, whole(faces))
    assert crop.cuts == ((95, 100),)
    assert (crop.squares[:100, 0] == 200).all() and (crop.squares[100:, 0] == 350).all()
    sound = PlacedSound(tone(300), 0.0, 0.0)
    with pytest.raises(Rejected, match="R_CUT"):
        check_window(Window(1, 81, 81), sound, crop.cuts)
    check_window(Window(0, 0, 81), sound, crop.cuts)
    check_window(Window(1, 100, 81), sound, crop.cuts)
    check_window(Window(1, 15, 81), sound, crop.cuts)  # its last frame is 95
    with pytest.raises(Rejected, match="R_CUT"):
        check_window(Window(1, 16, 81), sound, crop.cuts)


def test_each_scene_has_a_crop_of_its_own() -> None:
    """The face moves by less than a jump at the cut: no smoothing across it, and nothing outside the scenes."""
    centres = still()
    centres[20:] += 70
    faces = track(centres, frames=200)
    crop = plan_crop(faces, [Scene(0, 0, 98), Scene(2, 120, 200)])
    assert not crop.cuts
    assert (crop.squares[:98, 0] == 200).all() and (crop.squares[120:, 0] == 270).all()
    assert np.isnan(crop.squares[98:120]).all()


def spoiled(kind: str) -> FaceTrack:
    if kind == "missing":
        centres = still()
        centres[:3] = np.nan
        return track(centres)
    if kind == "none":
        return track(np.full((40, 2), np.nan))
    if kind == "small":
        return track(still(), side=31)
    faces = track(still())
    faces.rivals[:3] = True
    return faces


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", Reason.R_NOFACE),
        ("none", Reason.R_NOFACE),
        ("small", Reason.R_SMALLFACE),
        ("rival", Reason.R_MULTIFACE),
    ],
)
def test_bad_faces(kind: str, reason: Reason) -> None:
    with pytest.raises(Rejected) as caught:
        check_faces(spoiled(kind), 128, LIMITS)
    assert caught.value.reason == reason and "expected" in caught.value.detail


def test_good_faces_pass() -> None:
    one_missed = still()
    one_missed[0] = np.nan
    for faces in (track(still()), track(still(), side=33), track(one_missed), track(still(17))):
        check_faces(faces, 128, LIMITS)


@pytest.mark.parametrize(
    ("wave", "reason"),
    [
        (np.zeros(0), Reason.R_NOAUDIO),
        (np.zeros(16_000), Reason.R_SILENT),
        (np.full(16_000, 5e-4), Reason.R_SILENT),
        (np.full(16_000, np.nan), Reason.E_NONFINITE),
    ],
)
def test_bad_sound(wave: np.ndarray, reason: Reason) -> None:
    with pytest.raises(Rejected) as caught:
        check_sound(PlacedSound(wave.astype(np.float32), 0.0, 0.0), LIMITS)
    assert caught.value.reason == reason
    with pytest.raises(Rejected, match="R_NOAUDIO"):
        check_sound(None, LIMITS)


def test_windows_and_their_sound() -> None:
    assert [(w.index, w.start) for w in plan_windows([Scene(0, 0, 250)])] == [(0, 0), (1, 81), (2, 162)]
    assert plan_windows([Scene(0, 0, 80)]) == []
    window = Window(1, 81, 81)
    check_window(window, PlacedSound(tone(162), 0.0, 0.0), ())
    for wave, start in ((tone(162)[:-1], 0.0), (tone(300), 4.0)):
        with pytest.raises(Rejected, match="R_NOAUDIO"):
            check_window(window, PlacedSound(wave, start, 0.0), ())


def test_audio_of_a_window_is_that_of_the_whole_track(tmp_path: Path) -> None:
    encoder = LogMelAudio()
    wave = tone(200)
    whole = encoder.encode(wave)
    with features.audio_track(encoder, wave, tmp_path) as track:
        audio = features.audio_window(track, Window(1, 81, 81))
    assert audio.tag == encoder.tag and audio.data.shape == (21, 8, 80) and audio.data.dtype == torch.float16
    # Latent frame j >= 1 holds 50 Hz frames 8j-6 .. 8j+1 of the window, which starts at frame 162 of the video.
    assert torch.equal(audio.data[5], whole[162 + 34 : 162 + 42].half())
    assert torch.equal(audio.data[20, -1], whole[162 + 161].half())
    assert torch.equal(audio.data[0, 6], whole[162].half()) and torch.equal(audio.data[0, 7], whole[163].half())


def test_sidecar_motion_of_a_window() -> None:
    motion = Motion("test", ("k",), torch.arange(200.0)[:, None])
    struct = features.sidecar_motion(motion, Window(1, 81, 81)).data
    assert struct.shape == (21, 4, 1)
    assert struct[0].flatten().tolist() == [81] * 4
    assert struct[1].flatten().tolist() == [82, 83, 84, 85] and struct[20, 3, 0] == 161


def test_voiced_frames_follow_the_sound() -> None:
    wave = np.zeros(162 * 640, np.float32)
    wave[(81 + 4 * 9 + 1) * 640 : (81 + 4 * 12 + 1) * 640] = 0.3  # latent frames 10, 11, 12 of the second window
    loudness = features.loudness(wave)
    voiced = features.voiced_frames(loudness, Window(1, 81, 81))
    assert voiced.dtype == torch.bool and voiced.nonzero().flatten().tolist() == [10, 11, 12]
    assert not features.voiced_frames(loudness, Window(0, 0, 81)).any()


def test_an_extractor_that_gives_nan_is_named(tmp_path: Path) -> None:
    class Broken(LogMelAudio):
        tag = "broken-v1"

        def stream(self, wave: Samples) -> Iterator[torch.Tensor]:
            return (part * float("nan") for part in super().stream(wave))

    with ExitStack() as files, pytest.raises(Rejected, match="E_NONFINITE: broken-v1 gave NaN"):
        files.enter_context(features.audio_track(Broken(), tone(10), tmp_path))
