"""Cutting and cropping against clips that tell their frame numbers."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import odd_videos as odd
from helpers.clips import write_frames
from helpers.interlaced_clips import HEIGHT, OPTIONS, WIDTH, bar, combing, frame_of, woven
from helpers.numbered_clip import number_in, number_place, numbered_clip, picture, pictures_of

from dualforce.codecs.media import MediaError, iter_frames, probe, read_audio, read_sound
from tools.download import cut as cutting
from tools.download.cut import Span, cut
from tools.download.reasons import ClipFailure, Reason
from tools.download.records import PixelRule, SquareRule

RULE = PixelRule(Fraction(40), Fraction(30), Fraction(168), Fraction(126), 144)  # 128 x 96 of 192 x 144
NTSC = Fraction(30_000, 1001)


def numbers(path: Path, size: tuple[int, int] = (192, 144), corner: tuple[int, int] = (40, 30)) -> list[int]:
    top, left = number_place(size)
    return [number_in(image, top - corner[1], left - corner[0]) for _, image in pictures_of(path)]


def expected_numbers(span: Span, rate: Fraction, count: int) -> list[int]:
    return [k for k in range(count) if span.start <= Fraction(k) / rate < span.end]


@pytest.mark.parametrize(
    ("rate", "start", "end"),
    [
        (Fraction(25), Fraction(1), Fraction(3)),
        (Fraction(25), Fraction("0.99"), Fraction("2.41")),
        (Fraction(25), Fraction(0), Fraction(2)),
        (Fraction(25), Fraction("3.2"), Fraction("4.68")),  # behind a seek
        (NTSC, Fraction("1.3013"), Fraction("2.5025")),
        (Fraction(60), Fraction("0.5"), Fraction("1.25")),
    ],
)
def test_cut_is_exact_to_the_frame(tmp_path: Path, rate: Fraction, start: Fraction, end: Fraction) -> None:
    count, span = int(5 * rate), Span(start, end)
    source = numbered_clip(tmp_path / "a.mp4", count, rate=rate)
    info = cut(source, tmp_path / "b.mp4", span, RULE)
    assert numbers(tmp_path / "b.mp4") == expected_numbers(span, rate, count)
    assert info.frames == len(expected_numbers(span, rate, count))
    times = [time for time, _ in pictures_of(tmp_path / "b.mp4")]
    assert times[0] == 0 and max(abs(t - k / rate) for k, t in enumerate(times)) < Fraction(1, 10_000)


def test_matroska_times_in_whole_milliseconds_are_exact_too(tmp_path: Path) -> None:
    source = numbered_clip(tmp_path / "a.mkv", 120, rate=NTSC)
    span = Span(Fraction(30) / NTSC, Fraction(60) / NTSC)
    cut(source, tmp_path / "b.mp4", span, RULE)
    assert numbers(tmp_path / "b.mp4") == list(range(30, 60))


@pytest.mark.parametrize(
    ("pix_fmt", "size"),
    [
        ("yuv420p", (192, 144)),
        ("yuv444p", (192, 144)),
        ("yuvj420p", (192, 144)),
        ("yuv420p10le", (192, 144)),
        ("yuv444p", (193, 145)),
    ],
)
def test_crop_copies_the_pixels(tmp_path: Path, pix_fmt: str, size: tuple[int, int]) -> None:
    source = numbered_clip(tmp_path / "a.mp4", 30, size=size, pix_fmt=pix_fmt)
    rule = PixelRule(Fraction(40), Fraction(30), Fraction(168), Fraction(126), size[1])
    info = cut(source, tmp_path / "b.mp4", Span(Fraction(0), Fraction(1)), rule)
    assert (info.width, info.height) == (128, 96)
    whole = picture(0, size)[..., 0].astype(float)
    got = pictures_of(tmp_path / "b.mp4")[0][1].astype(float)
    errors = {
        (dx, dy): np.abs(whole[30 + dy : 126 + dy, 40 + dx : 168 + dx] - got).mean()
        for dx in range(-2, 3)
        for dy in range(-2, 3)
    }
    assert min(errors, key=lambda key: errors[key]) == (0, 0) and errors[0, 0] < 3


@pytest.mark.parametrize(("pix_fmt", "touch"), [("yuv420p10le", odd.hdr), ("yuvj420p", odd.full_range)])
def test_colours_are_still_what_they_were_called(tmp_path: Path, pix_fmt: str, touch: Any) -> None:
    """HDR above all: taken for SDR, everything that is made of the clip would be pale."""
    odd.make(tmp_path / "a.mp4", count=30, pix_fmt=pix_fmt, touch=touch)
    whole = PixelRule(Fraction(0), Fraction(0), Fraction(64), Fraction(64), 64)
    cut(tmp_path / "a.mp4", tmp_path / "b.mp4", Span(Fraction(0), Fraction(1)), whole)
    before, after = (list(iter_frames(tmp_path / name)) for name in ("a.mp4", "b.mp4"))
    for (_, one), (_, other) in zip(before, after, strict=False):
        assert np.abs(one.astype(int).mean((0, 1)) - other.mean((0, 1))).max() < 3


@pytest.mark.parametrize("first", ["tff", "bff"])
@pytest.mark.parametrize(("start", "end"), [("0.4", "1.4"), ("0", "2")])
def test_interlaced_pictures_are_whole_in_the_clip(tmp_path: Path, first: str, start: str, end: str) -> None:
    """Nobody could tell later: clips are encoded as whole pictures, and a crop begins with a line of either field."""
    made = [frame_of(woven(k, first == "tff"), first) for k in range(50)]
    write_frames(tmp_path / "a.ts", made, "libx264", Fraction(25), OPTIONS)
    rule = PixelRule(Fraction(8), Fraction(6), Fraction(WIDTH), Fraction(HEIGHT - 8), HEIGHT)
    source = list(pictures_of(tmp_path / "a.ts"))
    span = Span(*(source[0][0] + Fraction(time) for time in (start, end)))
    info = cut(tmp_path / "a.ts", tmp_path / "b.mp4", span, rule)
    first_number, found = int(25 * Fraction(start)), [image for _, image in iter_frames(tmp_path / "b.mp4")]
    assert info.frames == len(found) == 25 * (Fraction(end) - Fraction(start))
    for number, image in enumerate(found, start=first_number):
        if number not in (0, 49):  # the ends of the source lack a neighbour
            assert combing(image) < 0.7
            assert np.abs(image.astype(int) - bar(2 * number)[6:-8, 8:]).mean() < 2.5, number


def test_fields_that_are_pictures_of_their_own_are_refused(tmp_path: Path) -> None:
    """HEVC with field_seq_flag, of which FFmpeg hands out fields: the clip would be half as high, and not say so."""
    fields = [frame_of(np.ascontiguousarray(woven(k // 2)[k % 2 :: 2])) for k in range(60)]
    write_frames(tmp_path / "a.mp4", fields, "libx265", Fraction(50), {"x265-params": "log-level=none:interlace=tff"})
    with pytest.raises(ClipFailure, match=r"^decode: HEVC with each field as a picture of its own"):
        cut(tmp_path / "a.mp4", tmp_path / "b.mp4", Span(Fraction(0), Fraction(1)), RULE)


def test_crop_is_scaled_to_the_real_height(tmp_path: Path) -> None:
    source = numbered_clip(tmp_path / "a.mp4", 30)
    rule = PixelRule(Fraction(200), Fraction(150), Fraction(840), Fraction(630), 720)
    info = cut(source, tmp_path / "b.mp4", Span(Fraction(0), Fraction(1)), rule)
    assert (info.width, info.height) == (128, 96) and numbers(tmp_path / "b.mp4") == list(range(25))


@pytest.mark.parametrize("start", [Fraction(0), Fraction("1.02"), Fraction("2.3")])
@pytest.mark.parametrize("codec", [("libx264", "aac"), ("libvpx-vp9", "libopus")], ids=["mp4", "webm"])
def test_sound_stays_with_the_picture(tmp_path: Path, start: Fraction, codec: tuple[str, str]) -> None:
    beep = Fraction(3)
    source = numbered_clip(tmp_path / f"a.{'mp4' if codec[1] == 'aac' else 'webm'}", 125, beep=beep, codec=codec)
    cut(source, tmp_path / "b.mp4", Span(start, Fraction(5)), RULE)
    first = Fraction(-(-start * 25 // 1), 25)  # time of the first picture of the clip
    sound = read_sound(tmp_path / "b.mp4", probe(tmp_path / "b.mp4").zero)
    assert sound is not None
    onset = np.flatnonzero(np.abs(sound.wave) > 0.1)[0] / 16_000
    assert abs(onset - float(beep - first)) <= 0.010
    assert abs(len(sound.wave) / 16_000 - float(5 - first)) < 0.1


def test_sound_that_begins_late_is_silent_until_then_and_this_is_recorded(tmp_path: Path) -> None:
    source = numbered_clip(tmp_path / "a.mp4", 75, sound=(Fraction("1.5"), Fraction("2.5")))
    info = cut(source, tmp_path / "b.mp4", Span(Fraction(1), Fraction(3)), RULE)
    assert info.sound_gap == pytest.approx(1.0, abs=0.06)
    wave = read_audio(tmp_path / "b.mp4")
    onset = np.flatnonzero(np.abs(wave) > 0.1)[0] / 16_000
    assert abs(onset - 0.5) <= 0.010


def test_video_without_sound_gives_a_clip_without_sound(tmp_path: Path) -> None:
    source = numbered_clip(tmp_path / "a.mkv", 50, sound=None)
    info = cut(source, tmp_path / "b.mp4", Span(Fraction(0), Fraction(2)), RULE)
    assert info.frames == 50
    with pytest.raises(MediaError):
        read_audio(tmp_path / "b.mp4")


@pytest.mark.parametrize(
    ("span", "rule", "reason"),
    [
        (Span(Fraction(1), Fraction("4.5")), RULE, Reason.LENGTH),
        (Span(Fraction(9), Fraction(12)), RULE, Reason.LENGTH),
        (Span(Fraction(0), Fraction(2)), PixelRule(*map(Fraction, (200, 10, 300, 90)), 144), Reason.CROP),
    ],
)
def test_what_is_not_there_is_a_reason(tmp_path: Path, span: Span, rule: PixelRule, reason: Reason) -> None:
    source = numbered_clip(tmp_path / "a.mp4", 75)
    with pytest.raises(ClipFailure) as error:
        cut(source, tmp_path / "b.mp4", span, rule)
    assert error.value.reason is reason


def test_a_little_missing_at_the_end_is_allowed(tmp_path: Path) -> None:
    """Annotations in whole seconds often end just behind the video."""
    source = numbered_clip(tmp_path / "a.mp4", 75)
    info = cut(source, tmp_path / "b.mp4", Span(Fraction(1), Fraction("3.8")), RULE)
    assert info.frames == 50 and info.seconds == pytest.approx(2.0)


def test_hole_in_the_pictures_is_a_reason(tmp_path: Path) -> None:
    source = numbered_clip(tmp_path / "a.mp4", 100, missing=range(30, 60))
    with pytest.raises(ClipFailure) as error:
        cut(source, tmp_path / "b.mp4", Span(Fraction(0), Fraction(4)), RULE)
    assert error.value.reason is Reason.HOLE


@pytest.mark.parametrize("content", [b"", b"no video", b"\0" * 5000])
def test_what_is_not_a_video_is_a_reason(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    with pytest.raises(ClipFailure) as error:
        cut(tmp_path / "a.mp4", tmp_path / "b.mp4", Span(Fraction(0), Fraction(1)), RULE)
    assert error.value.reason is Reason.DECODE and "\n" not in error.value.message


def test_truncated_video_is_a_reason(tmp_path: Path) -> None:
    source = numbered_clip(tmp_path / "a.mkv", 100)
    source.write_bytes(source.read_bytes()[: source.stat().st_size // 3])
    with pytest.raises(ClipFailure) as error:
        cut(source, tmp_path / "b.mp4", Span(Fraction(0), Fraction(4)), RULE)
    assert error.value.reason in (Reason.DECODE, Reason.LENGTH)


def test_full_disk_is_no_fault_of_the_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = numbered_clip(tmp_path / "a.mp4", 30)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cutting._Pictures, "add", full)
    with pytest.raises(OSError, match="No space left"):
        cut(source, tmp_path / "b.mp4", Span(Fraction(0), Fraction(1)), RULE)


def test_square_rule_as_the_published_tool_does_it() -> None:
    """top 0.25 - 0.02, bottom 0.75 + 0.02, left 0.3 - 0.02, right 0.5 + 0.02 of 1000 x 500: 240 wide, 270 high."""
    rule = SquareRule(*map(Fraction, ("0.25", "0.75", "0.3", "0.5")))
    box = rule.box(1000, 500)
    assert box is not None and (box.x, box.y, box.width, box.height) == (280, 130, 240, 240)


@pytest.mark.parametrize("size", [(640, 360), (641, 361), (2, 2), (3, 1080)])
def test_boxes_stay_inside_and_even(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        top, left = (Fraction(float(v)) for v in rng.uniform(0, 0.9, 2))
        shares = rng.uniform(0.1, 1, 2)
        bottom, right = (low + Fraction(float(v)) * (1 - low) for low, v in zip((top, left), shares, strict=True))
        wide, high = size
        pixels = PixelRule(left * wide - 5, top * high - 5, right * wide + 5, bottom * high + 5, high, wide)
        for rule in (SquareRule(top, bottom, left, right), pixels):
            box = rule.box(*size)
            if box is not None:
                assert box.x >= 0 and box.y >= 0 and box.width > 0 and box.height > 0
                assert box.x + box.width <= wide and box.y + box.height <= high
                assert not any(v % 2 for v in (box.x, box.y, box.width, box.height))
