"""Files on the project's clock: pictures by presentation time, sound on the same zero, one-line errors."""

from __future__ import annotations

import math
import wave
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.clips import copy_head, flash_clip, textured, tone

from dualforce.codecs.media import (
    MediaError,
    iter_frames,
    probe,
    read_audio,
    read_image,
    read_sound,
    read_video,
    write_video,
)
from dualforce.codecs.media.sound import _decoded
from dualforce.codecs.media_clock import SoundPlacer


def steady(rate: Fraction, seconds: float = 2.5) -> list[Fraction]:
    return [k / rate for k in range(int(seconds * rate))]


def jittered(seconds: float = 2.5) -> list[Fraction]:
    """Variable frame rate: 10 to 80 ms between pictures."""
    rng = np.random.default_rng(3)
    steps = [Fraction(int(ms), 1000) for ms in rng.integers(10, 80, 100)]
    times = [sum(steps[:k], Fraction(0)) for k in range(100)]
    return [time for time in times if time < seconds]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("times", "start"),
    [
        (steady(Fraction(25)), Fraction(0)),
        (steady(Fraction(24_000, 1001)), Fraction(0)),
        (steady(Fraction(30_000, 1001)), Fraction(0)),
        (steady(Fraction(50)), Fraction(0)),
        (jittered(), Fraction(0)),
        (steady(Fraction(30)), Fraction(7, 10)),
    ],
    ids=["25", "23.976", "29.97", "50", "variable", "late start"],
)
def test_flash_and_beep_stay_together(tmp_path: Path, suffix: str, times: list[Fraction], start: Fraction) -> None:
    path = tmp_path / f"clip.{suffix}"
    moment = flash_clip(path, times, len(times) // 2, start=start, sound=(Fraction(0), Fraction(3)))
    video = read_video(path)
    bright = video.frames.mean(axis=(1, 2, 3)) > 128
    first = int(np.argmax(bright))
    # The first white pixel frame is the first at or after the flash. Matroska keeps times to 1 ms, so a flash on the
    # boundary of a pixel frame may fall to either side.
    millisecond = Fraction(1, 1000)
    assert first in {math.ceil((moment + shift) * 25) for shift in (-millisecond, 0, millisecond)}
    assert bright[first:].all() and not bright[:first].any()
    assert video.sound is not None
    onset = int(np.argmax(np.abs(video.sound.wave) > 0.1)) / 16_000
    assert abs(onset - float(moment)) < 0.01
    assert abs(onset - first / 25) <= 0.04 + 0.002
    # One pixel frame per 40 ms of screen time.
    end = times[-1] + (times[-1] - times[-2])
    assert abs(len(video.frames) - float(end) * 25) <= 2


def test_later_sound_keeps_its_place(tmp_path: Path) -> None:
    path = tmp_path / "late.mkv"
    moment = flash_clip(path, steady(Fraction(25)), 40, sound=(Fraction(1, 2), Fraction(5, 2)))
    sound = read_sound(path, probe(path).zero)
    assert sound is not None
    assert abs(sound.start - 0.5) < 0.03
    assert not sound.wave[: int(0.45 * 16_000)].any()
    assert abs(int(np.argmax(np.abs(sound.wave) > 0.1)) / 16_000 - float(moment)) < 0.01


def test_write_then_read(tmp_path: Path) -> None:
    frames, wave = textured(30), tone(30)
    path = tmp_path / "out.mp4"
    assert write_video(path, iter(frames), wave) == 30
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
    video = read_video(path)
    assert video.frames.shape == frames.shape
    error = np.abs(video.frames.astype(int) - frames)
    assert error.mean() < 3
    assert video.sound is not None and video.sound.start == 0 and video.sound.gap == 0
    assert len(video.sound.wave) >= len(wave)
    heard = video.sound.wave[: len(wave)]
    assert np.corrcoef(heard[2000:-2000], wave[2000:-2000])[0, 1] > 0.98
    assert probe(path).rate == 25
    again = read_video(path, start=10, stop=20)
    assert np.array_equal(again.frames, video.frames[10:20])
    assert again.sound is not None and np.array_equal(again.sound.wave, video.sound.wave[6400:12_800])
    assert [k for k, _ in iter_frames(path, step=8, last=True)] == [0, 8, 16, 24, 29]
    assert [k for k, _ in iter_frames(path, step=29, last=True)] == [0, 29]


def test_video_without_sound(tmp_path: Path) -> None:
    path = tmp_path / "mute.mp4"
    write_video(path, textured(5), None)
    assert read_video(path).sound is None
    assert not probe(path).sound
    with pytest.raises(MediaError, match="no sound stream"):
        read_audio(path)


def test_shrink_rotation_and_pixel_shape(tmp_path: Path) -> None:
    path = tmp_path / "wide.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.sample_aspect_ratio = Fraction(2, 1)
        stream.set_display_rotation(90)
        picture = np.zeros((48, 64, 3), np.uint8)
        picture[:, :32] = 255  # the left half is white
        for k in range(4):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = k
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    info = probe(path)
    assert (info.width, info.height) == (48, 128)
    upright = read_image(path)
    assert upright.shape == (128, 48, 3)
    # The matrix asks for a quarter turn to the left: left comes to the bottom.
    assert upright[90:].mean() > 240 and upright[:38].mean() < 15
    assert next(iter_frames(path, max_side=64))[1].shape == (64, 24, 3)


@pytest.mark.parametrize("content", [b"", b"not a video at all" * 50], ids=["empty", "text"])
def test_undecodable_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.mp4"
    path.write_bytes(content)
    for read in (probe, read_video, read_audio, read_image):
        with pytest.raises(MediaError) as caught:
            read(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_and_truncated_file(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="No such file"):
        probe(tmp_path / "none.mp4")
    whole = tmp_path / "whole.mp4"
    write_video(whole, textured(30), tone(30))
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with pytest.raises(MediaError, match="cannot decode"):
        read_video(cut)


@pytest.mark.parametrize("channels", [1, 2, 3, 6, 8])
def test_the_number_of_channels_does_not_change_the_level(channels: int, tmp_path: Path) -> None:
    """A voice that is in all channels is as loud as in one."""
    path = tmp_path / "sound.wav"
    samples = (0.5 * 32_767 * np.sin(np.arange(32_000) / 10)).astype("<i2").repeat(channels)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(32_000)
        file.writeframes(samples.tobytes())
    heard = read_audio(path)
    assert abs(float(np.abs(heard[1000:-1000]).max()) - 0.5) < 0.005


def test_one_channel_of_two_is_half_as_loud(tmp_path: Path) -> None:
    path = tmp_path / "left.wav"
    both = np.stack([0.5 * 32_767 * np.sin(np.arange(16_000) / 10), np.zeros(16_000)], axis=1).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(both.tobytes())
    assert abs(float(np.abs(read_audio(path)).max()) - 0.25) < 0.005


def test_sound_that_changes_its_kind_on_the_way() -> None:
    """Stereo at 44.1 kHz, then mono at 48 kHz without a hole: each kind is resampled by itself, at one level."""

    class Container:
        def decode(self, stream: None) -> Iterator[av.AudioFrame]:
            for hz, channels, first in ((44_100, 2, 0), (48_000, 1, 48_000)):
                samples = np.full((1, hz * channels), 0.5, np.float32)
                frame = av.AudioFrame.from_ndarray(samples, "flt", "stereo" if channels == 2 else "mono")
                frame.sample_rate, frame.pts, frame.time_base = hz, first, Fraction(1, hz)
                yield frame

    placer = SoundPlacer(None)
    parts = list(_decoded(Container(), None, placer))
    assert placer.runs == 2 and placer.samples == 32_000 and placer.gap == 0
    runs = [np.concatenate([part for place, part in parts if (place < 16_000) == first]) for first in (True, False)]
    assert [len(run) for run in runs] == [16_000, 16_000]
    assert all(np.abs(run[100:-100] - 0.5).max() < 0.01 for run in runs)


def test_a_name_is_no_pattern(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "p1.jpg"), "w", format="mjpeg") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuvj420p"
        frame = av.VideoFrame.from_ndarray(textured(1, 64)[0], format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert read_image(tmp_path / "p1.jpg").shape == (64, 64, 3)
    (tmp_path / "p%d.jpg").write_text("not a picture")
    with pytest.raises(MediaError, match="cannot decode"):
        read_image(tmp_path / "p%d.jpg")


@pytest.mark.parametrize(
    "text", ["ffconcat version 1.0\nfile whole.mp4\n", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nwhole.mp4\n"]
)
def test_a_file_that_names_other_files_is_not_followed(text: str, tmp_path: Path) -> None:
    write_video(tmp_path / "whole.mp4", textured(5), tone(5))
    for name in ("list.mp4", "list.m3u8", "list.ffconcat"):
        (tmp_path / name).write_text(text)
        for read in (probe, read_image, read_audio):
            with pytest.raises(MediaError, match="cannot decode"):
                read(tmp_path / name)


def test_a_picture_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, textured(5), None)
    monkeypatch.setattr("dualforce.codecs.media.container.MAX_PIXELS", 160 * 160 // 2)
    with pytest.raises(MediaError, match="cannot decode"):
        probe(path)


def test_sound_only_file_has_no_pictures(clips_dir: Path) -> None:
    path = clips_dir / "audio" / "real3dportrait_Obama_5s.wav"
    wave = read_audio(path)
    assert wave.dtype == np.float32 and abs(len(wave) / 16_000 - 5) < 0.1
    with pytest.raises(MediaError, match="no video stream"):
        read_video(path)


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_bytes(b"what was there before")
    good, odd = np.zeros((16, 16, 3), np.uint8), np.zeros((15, 16, 3), np.uint8)
    for frames in ([good, odd], [odd], [], [good.astype(np.float32)], [good, good[:, :8]]):
        with pytest.raises(MediaError, match=r"out\.mp4"):
            write_video(path, frames, None)
    assert [p.name for p in tmp_path.iterdir()] == ["out.mp4"]
    assert path.read_bytes() == b"what was there before"
    with pytest.raises(MediaError, match="cannot write"):
        write_video(tmp_path / "no" / "such" / "out.mp4", [good], None)


def test_odd_frame_rate_of_a_real_clip(clips_dir: Path, tmp_path: Path) -> None:
    """1350/61 frames a second, first picture 33 ms after the sound."""
    path = tmp_path / "head.mp4"
    copy_head(clips_dir / "video" / "man_interview_6s.mp4", path, 2.0)
    info = probe(path)
    count = sum(1 for _ in iter_frames(path))
    assert abs(info.rate - 22.13) < 0.3
    assert 45 <= count <= 51
