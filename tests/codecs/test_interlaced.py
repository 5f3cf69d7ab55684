"""Interlaced clips come out as whole pictures, one for each at its time; progressive ones are left alone."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from helpers.clips import copy_head, write_frames
from helpers.interlaced_clips import HEIGHT, OPTIONS, WHOLE, WIDTH, bar, combing, frame_of, woven

from dualforce.codecs.media import MediaError, Treatment, interlaced, iter_frames, pictures, probe
from dualforce.codecs.media.interlaced import progressive
from dualforce.codecs.media_clock import Timed


def raw(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


@pytest.mark.parametrize("suffix", ["ts", "mp4", "mkv"])
@pytest.mark.parametrize("first", ["tff", "bff"])
def test_a_moving_bar_has_no_combs(suffix: str, first: str, tmp_path: Path) -> None:
    path = tmp_path / f"clip.{suffix}"
    made = [frame_of(woven(k, first == "tff"), first) for k in range(30)]
    write_frames(path, made, "libx264", Fraction(25), OPTIONS)
    treatment = Treatment()
    found = [picture for _, picture in iter_frames(path, treatment=treatment)]
    before = raw(path)
    assert len(found) == len(before) == 30
    assert np.mean([combing(picture) for picture in before]) > 3
    assert max(combing(picture) for picture in found[1:-1]) < 0.5
    assert max(combing(picture) for picture in found) < 2  # the ends lack a neighbour
    # The bar is where it was at the time of the first field.
    for number, picture in enumerate(found[1:-1], start=1):
        assert np.abs(picture.astype(int) - bar(2 * number)).mean() < 1.5, number
    assert treatment.entry() == {"interlaced": True, "deinterlacer": "bwdif"} and treatment.interlaced == 30


def test_progressive_pictures_are_left_alone(tmp_path: Path) -> None:
    """To the byte; a filter is not even made."""
    write_frames(tmp_path / "a.mp4", [frame_of(bar(2 * k)) for k in range(12)], "libx264", Fraction(25), WHOLE)
    treatment = Treatment()
    found = [picture for _, picture in iter_frames(tmp_path / "a.mp4", treatment=treatment)]
    assert np.array_equal(found, raw(tmp_path / "a.mp4")) and treatment.entry() == {}


def test_a_real_clip_makes_no_filter(clips_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_head(clips_dir / "video" / "man_interview_6s.mp4", tmp_path / "a.mp4", 1.0)

    def refuse(frame: Any) -> None:
        raise AssertionError("a deinterlacer was made")

    monkeypatch.setattr(interlaced, "_Deinterlacer", refuse)
    with monkeypatch.context() as without:
        without.setattr(pictures, "progressive", lambda timed: timed)
        wanted = [picture for _, picture in iter_frames(tmp_path / "a.mp4")]
    assert np.array_equal([picture for _, picture in iter_frames(tmp_path / "a.mp4")], wanted)


def frames(kinds: str, sizes: str | None = None) -> list[av.VideoFrame]:
    """Decoded frames, `i` interlaced, `p` progressive."""
    made = []
    for number, kind in enumerate(kinds):
        noise = np.random.default_rng(number).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
        picture = woven(number) if kind == "i" else noise  # lines that a deinterlacer would change
        if sizes and sizes[number] == "s":
            picture = picture[: HEIGHT // 2, : WIDTH // 2]
        codec: Any = av.CodecContext.create("libx264", "w")
        codec.width, codec.height, codec.pix_fmt = picture.shape[1], picture.shape[0], "yuv420p"
        codec.time_base = Fraction(1, 25)
        codec.options = OPTIONS if kind == "i" else WHOLE
        packets = [*codec.encode(frame_of(picture, "tff" if kind == "i" else "prog")), *codec.encode(None)]
        decoder: Any = av.CodecContext.create("h264", "r")
        found = [frame for packet in packets for frame in decoder.decode(packet)] + list(decoder.decode(None))
        found[0].time_base = Fraction(1, 25)
        assert len(found) == 1 and found[0].interlaced_frame == (kind == "i")
        made += found
    return made


@pytest.mark.parametrize(
    ("kinds", "sizes"),
    [("i", None), ("ii", None), ("iii", None), ("pppiiippi", None), ("pip", None), ("iippii", "llssll"), ("is", "ls")],
)
def test_as_many_as_come_at_their_times(kinds: str, sizes: str | None) -> None:
    """Each with the time and length that the file gave it, also none, whatever is mixed."""
    kinds = kinds.replace("s", "p")
    came = [
        Timed(frame, None if number == 2 else Fraction(3 * number, 7), Fraction(1, number + 9))
        for number, frame in enumerate(frames(kinds, sizes))
    ]
    gone = list(progressive(came))
    assert [picture[1:] for picture in gone] == [picture[1:] for picture in came]
    for old, new, kind in zip(came, gone, kinds, strict=True):
        assert (new.item.width, new.item.height) == (old.item.width, old.item.height)
        if kind == "p":
            assert np.array_equal(new.item.to_ndarray(), old.item.to_ndarray())
    if kinds == "pppiiippi":
        assert combing(gone[4].item.to_ndarray(format="rgb24")) < 1


def test_what_frames_say_is_kept() -> None:
    """Colour tags and rotation decide how the picture is turned into RGB."""
    came = frames("iii")
    for frame in came:
        frame.colorspace, frame.color_range, frame.color_trc, frame.color_primaries = 9, 2, 16, 9
    for picture in progressive(Timed(frame, None, None) for frame in came):
        frame = picture.item
        assert (frame.colorspace, frame.color_range, frame.color_trc, frame.color_primaries) == (9, 2, 16, 9)


@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30_000, 1001)])
def test_pixel_frames_are_those_of_the_clock(rate: Fraction, tmp_path: Path) -> None:
    """The bar's place says when a picture was shown: the pixel frames of the woven clip are those of a progressive one
    with the same pictures."""
    write_frames(tmp_path / "i.ts", [frame_of(woven(k), "tff") for k in range(24)], "libx264", rate, OPTIONS)
    write_frames(tmp_path / "p.ts", [frame_of(bar(2 * k)) for k in range(24)], "libx264", rate, WHOLE)
    one, other = (list(iter_frames(tmp_path / name)) for name in ("i.ts", "p.ts"))
    assert [k for k, _ in one] == [k for k, _ in other]
    for (k, found), (_, wanted) in list(zip(one, other, strict=True))[2:-2]:
        assert np.abs(found.astype(int) - wanted).mean() < 1.5, k


@pytest.mark.parametrize("order", ["tff", "bff"])
def test_fields_that_are_pictures_of_their_own_are_refused(order: str, tmp_path: Path) -> None:
    """HEVC with field_seq_flag: the decoder gives pictures of half the height."""
    path = tmp_path / "fields.mp4"
    fields = [frame_of(np.ascontiguousarray(woven(k // 2)[k % 2 :: 2])) for k in range(20)]
    write_frames(path, fields, "libx265", Fraction(50), {"x265-params": f"log-level=none:interlace={order}"})
    assert all(frame.shape[0] == fields[0].height for frame in raw(path))
    for read in (probe, lambda video: next(iter_frames(video))):
        with pytest.raises(MediaError, match="HEVC with each field as a picture of its own: expected whole pictures"):
            read(path)


def test_whole_pictures_of_hevc_are_read(tmp_path: Path) -> None:
    path = tmp_path / "whole.mp4"
    options = {"x265-params": "log-level=none"}
    write_frames(path, [frame_of(woven(k)) for k in range(5)], "libx265", Fraction(25), options)
    assert len(list(iter_frames(path))) == 5
