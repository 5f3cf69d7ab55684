"""Odd and hostile videos: each ends as a sample or with a reason that a user can act on, never as a fault of ours."""

from __future__ import annotations

import os
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from helpers import odd_videos as odd
from helpers.clips import sidecar_json, write_sidecar
from helpers.odd_videos import SIZE, content, damaged, make, video

from dualforce.codecs.media import MediaError, iter_frames
from dualforce.codecs.motion_sidecar import find_sidecar
from dualforce.preprocess.build import BuildError, BuildOptions, build_shards
from dualforce.preprocess.files import find_videos
from dualforce.preprocess.job import Job, Outcome
from dualforce.preprocess.process import process_video
from dualforce.preprocess.quality import Limits
from dualforce.preprocess.reasons import Reason
from dualforce.preprocess.sample_file import load_sample

SECRET = b"RIFF or not, this text stands in another file"
TENTH = Fraction(1, 10)


def half(data: bytearray) -> bytes:
    return bytes(data[: len(data) // 2])


def front(path: Path) -> None:
    make(path, container={"movflags": "faststart"})


CASES = [
    # Not a video, or damaged.
    odd.Case("zero-length.mp4", content(b""), ("E_DECODE",)),
    odd.Case("text.mp4", content(b"not a video at all\n" * 50), ("E_DECODE",)),
    odd.Case("web-page.webm", content(b"<!doctype html><title>404</title>" * 20), ("E_DECODE",)),
    odd.Case("random.mkv", content(np.random.default_rng(0).bytes(20_000)), ("E_DECODE",)),
    odd.Case("zip.mp4", content(odd.zipped()), ("E_DECODE",)),
    odd.Case("header-only.mp4", damaged(make, lambda data: bytes(data[:40])), ("E_DECODE",)),
    odd.Case("header-only.mkv", damaged(make, lambda data: bytes(data[:300])), ("E_DECODE",)),
    odd.Case("no-index.mp4", damaged(make, half), ("E_DECODE",)),
    odd.Case("cut-mid-gop.mp4", damaged(front, half), ("E_DECODE", "R_SHORT", "R_NOAUDIO")),
    odd.Case("cut-mid-gop.mkv", damaged(make, half), ("E_DECODE", "R_SHORT", "R_NOAUDIO")),
    odd.Case("cut-mid-gop.ts", damaged(make, half), ("E_DECODE", "R_SHORT", "R_NOAUDIO")),
    odd.Case("holes.mp4", damaged(front, lambda data: odd.holes(data, every=997)), ("used", "E_DECODE")),
    odd.Case("holes.mkv", damaged(make, lambda data: odd.holes(data, every=997)), ("used", "E_DECODE", "R_NOAUDIO")),
    odd.Case("holes.ts", damaged(make, lambda data: odd.holes(data, every=997)),
             ("used", "E_DECODE", "R_NOAUDIO", "R_SHORT")),
    odd.Case("zeros-inside.mp4", damaged(front, lambda data: bytes(data[: len(data) // 2]) + bytes(len(data) // 2)),
             ("E_DECODE", "used", "R_NOAUDIO")),
    odd.Case("no-first-key-frame.mkv", odd.without_first_key_frame, ("used", "R_SHORT", "E_DECODE")),
    # Other files than they say, and files that name other files.
    odd.Case("playlist.mp4", content(b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nsecret.mp4\n#EXT-X-ENDLIST\n"),
             ("E_DECODE",)),
    odd.Case("concat.mp4", content(b"ffconcat version 1.0\nfile secret.mp4\n"), ("E_DECODE",)),
    odd.Case("session.mp4", content(b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nt=0 0\nm=video 9 RTP/AVP 96\n"),
             ("E_DECODE",)),
    odd.Case("huge-dimensions.mp4", content(odd.huge_gif(65_535)), ("E_DECODE", "R_NOAUDIO")),
    odd.Case("large-dimensions.mp4", content(odd.huge_gif(20_000)), ("E_DECODE", "R_NOAUDIO")),
    odd.Case("animation.mp4", lambda path: make(path, codec="gif", pix_fmt="rgb8", sound=None, format="gif"),
             ("R_NOAUDIO",)),
    video("sound-only.mp4", "E_DECODE", streams=(0, 1)),
    # Sound.
    video("mute.mp4", "R_NOAUDIO", sound=None),
    video("silent.mp4", "R_SILENT", gain=0.0),
    video("blink.mkv", "R_NOAUDIO", sound="pcm_s16le", layout="mono", hz=16_000, seconds=(0.0, 0.02)),
    video("whisper.mp4", "R_SILENT", gain=5e-4),
    video("clipped.mp4", "R_CLIPPED", wave=lambda wave: (wave * 50).clip(-1, 1)),
    video("5.1.mp4", layout="5.1", hz=48_000),
    video("ac3-5.1.ts", sound="ac3", layout="5.1", hz=48_000, slow=True),
    video("8-khz.mkv", sound="pcm_s16le", layout="mono", hz=8000),
    video("96-khz.mkv", sound="flac", hz=96_000, slow=True),
    video("opus.webm", codec="libvpx", options={"cpu-used": "16", "deadline": "realtime"}, sound="libopus",
          hz=48_000, slow=True),
    video("mp3.avi", codec="mpeg4", sound="libmp3lame", slow=True),
    video("mp2.mpg", codec="mpeg2video", sound="mp2", slow=True),
    video("pcm.mov", sound="pcm_s16le", slow=True),
    video("float-with-nan.mkv", "E_NONFINITE", sound="pcm_f32le", wave=odd.nan_sound),
    video("sound-short.mp4", "R_NOAUDIO", seconds=(0.0, 1.0)),
    video("sound-long.mp4", seconds=(0.0, 8.0)),
    video("sound-late.mkv", "R_NOAUDIO", seconds=(1.0, 4.0)),
    video("sound-a-moment-late.mkv", seconds=(0.03, 4.0)),
    video("sound-of-no-length.mp4", "R_NOAUDIO", seconds=(0.0, 0.0)),
    odd.Case("sound-changes-its-kind.ts", odd.two_sounds_in_turn, ("used",)),
    # Several streams.
    video("two-sounds.mkv", streams=(1, 2)),
    video("two-pictures.mkv", streams=(2, 1), slow=True),
    # Clocks.
    video("23.976.mp4", rate=Fraction(24_000, 1001)),
    video("29.97.mp4", rate=Fraction(30_000, 1001), count=103, slow=True),
    video("30.mkv", rate=Fraction(30), count=103, slow=True),
    video("50.mp4", rate=Fraction(50), count=170, slow=True),
    video("60.mp4", rate=Fraction(60), count=205, slow=True),
    video("120.mp4", rate=Fraction(120), count=410, slow=True),
    video("5-a-second.mp4", rate=Fraction(5), count=18),
    video("variable-rate.mp4", "used", "R_SHORT", times=odd.varying()),
    video("variable-rate.mkv", "used", "R_SHORT", times=odd.varying(), slow=True),
    video("edit-list.mp4", start=-TENTH, count=90),
    video("late-start.mkv", start=Fraction(7, 10)),
    video("starts-after-a-day.ts", start=Fraction(86_400)),
    video("gap-of-five-seconds.mp4", times=odd.with_gap(5), seconds=(0.0, 12.5), slow=True),
    video("gap-of-two-hours.mp4", "E_DECODE", times=odd.with_gap(7200), seconds=(0.0, 4.0)),
    video("b-frames.mp4", options={"preset": "veryfast", "bf": "8", "b-pyramid": "normal", "b_strategy": "0"}),
    video("one-picture.mp4", "R_SHORT", count=1, seconds=(0.0, 1.0)),
    video("two-pictures-only.mp4", "R_SHORT", count=2, seconds=(0.0, 1.0)),
    video("a-frame-too-short.mp4", "R_SHORT", count=80),
    # Pictures.
    video("turned-90.mp4", touch=odd.rotated(90), size=(64, 48)),
    video("turned-180.mp4", touch=odd.rotated(180), slow=True),
    video("wide-pixels.mp4", touch=odd.wide_pixels),
    video("10-bit.mp4", pix_fmt="yuv420p10le"),
    video("hdr.mp4", pix_fmt="yuv420p10le", touch=odd.hdr),
    video("hevc-10-bit.mkv", codec="libx265", pix_fmt="yuv420p10le",
          options={"preset": "ultrafast", "x265-params": "log-level=none"}, slow=True),
    video("odd-size.mkv", pix_fmt="yuv444p", size=(65, 51)),
    video("interlaced.ts", options={"x264-params": "tff=1", "flags": "+ildct+ilme"}),
    video("alpha.mov", codec="qtrle", pix_fmt="argb"),
    video("alpha.webm", codec="libvpx-vp9", pix_fmt="yuva420p",
          options={"cpu-used": "8", "deadline": "realtime"}, sound="libopus", hz=48_000, slow=True),
    video("grey.mp4", pix_fmt="gray", slow=True),
    video("4-2-2.mp4", pix_fmt="yuv422p", slow=True),
    video("full-range.mp4", pix_fmt="yuvj420p", touch=odd.full_range, slow=True),
    video("mjpeg.avi", codec="mjpeg", pix_fmt="yuvj420p", sound="pcm_s16le"),
    video("mpeg-4.avi", codec="mpeg4", sound="libmp3lame", slow=True),
    video("wmv.wmv", codec="wmv2", sound="libmp3lame", slow=True),
    video("flash.flv", codec="flv", sound="libmp3lame", slow=True),
    video("ffv1.mkv", codec="ffv1", slow=True),
    video("prores.mov", codec="prores_ks", pix_fmt="yuv422p10le", slow=True),
    video("av1.mp4", codec="libsvtav1", options={"preset": "12"}, size=(128, 128), slow=True),
    video("tiny.mkv", "R_SMALLFACE", size=(4, 4), options={"crf": "0"}),
    video("8k-of-one-picture.mp4", "R_SHORT", size=(7680, 4320), count=1, seconds=(0.0, 1.0)),
    video("wide-and-low.mkv", size=(4096, 16), pix_fmt="yuv420p", slow=True),
    odd.Case("grows.ts", odd.two_sizes, ("used",)),
]  # fmt: skip


def run(path: Path, scratch: Path) -> Outcome:
    """Through all stages, with a sidecar whose face lies in the middle of what can be decoded."""
    try:
        shown = [picture.shape for _, picture in iter_frames(path, max_side=512)]
    except MediaError:
        shown = [(*SIZE, 3)]
    height, width = shown[0][:2]
    box = [width / 4, height / 4, 3 * width / 4, 3 * height / 4]
    write_sidecar(path, sidecar_json(len(shown), face_boxes=[box] * len(shown)))
    limits = Limits(face_share=0.25)
    sidecar = path.with_suffix(".json")
    return process_video(Job(path, path.name, "key", "who", "", 0, 16, limits, sidecar, None, scratch))


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[pytest.mark.slow] * case.slow) for case in CASES]
)
def test_an_odd_video_ends_as_it_should(case: odd.Case, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    make(tmp_path / "secret.mp4")
    path = tmp_path / case.name
    case.make(path)
    outcome = run(path, tmp_path / "scratch")
    reasons = {entry["reason"] for entry in outcome.rejected}
    ends = reasons | ({"used"} if outcome.samples else set())
    assert ends and ends <= set(case.ends), outcome.rejected
    assert Reason.E_INTERNAL not in reasons
    for entry in outcome.rejected:
        assert entry["detail"] and "\n" not in entry["detail"] and len(entry["detail"]) < 300
    for stem in outcome.samples:
        sample = load_sample(stem)
        assert sample.video.float().std() > 0.01 and sample.audio.float().std() > 0.01


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 60 and len({case.name for case in CASES}) == len(CASES)


NAMES = [
    "-rf.mp4", "two\nlines.mp4", "$(touch x) `id` ; rm.mp4", "'quotes\".mp4", "smile \U0001f600.mp4", " .mp4",
    "concat:a.mp4", "pipe:0.mp4", "http:evil.mp4", "%d.mp4", "x" * 251 + ".mp4", os.fsdecode(b"\xff\xfe latin.mp4"),
]  # fmt: skip


def test_names_and_links(tmp_path: Path, landmarker_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No name is taken for an option, a protocol, a pattern or a command; no link leads in circles. The clips have no
    faces: each is read to that point."""
    make(tmp_path / "a.mp4", count=82)
    clip = (tmp_path / "a.mp4").read_bytes()
    folder = tmp_path / "clips"
    folder.mkdir()
    for number, name in enumerate(NAMES):
        (folder / name).write_bytes(clip + bytes(number))  # different files: zeros behind the last box change nothing
    os.symlink("loop.mp4", folder / "loop.mp4")
    os.symlink("nowhere.mp4", folder / "dangling.mp4")
    os.symlink(".", folder / "again")
    os.symlink("-rf.mp4", folder / "zz link.mp4")
    os.mkfifo(folder / "fifo.mp4")
    (folder / "folder.mp4").mkdir()
    shutil.copy(folder / "-rf.mp4", folder / "zz copy.mp4")
    monkeypatch.chdir(folder)
    with pytest.raises(BuildError, match="no video gave a sample"):
        build_shards(Path("."), tmp_path / "none", BuildOptions(size=16, face_landmarker=landmarker_file))
    for name in (*NAMES, "zz link.mp4"):
        assert next(iter_frames(Path(name)))[1].shape == (*SIZE, 3), name
    ends = {path.name: ends_of(path, landmarker_file, tmp_path) for path in find_videos(Path("."))}
    assert ends == {
        **dict.fromkeys([*NAMES, "zz link.mp4", "zz copy.mp4"], "R_NOFACE"),
        **dict.fromkeys(["loop.mp4", "dangling.mp4"], "E_DECODE"),
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "clips", "none"]


def ends_of(path: Path, landmarker: Path, scratch: Path) -> str:
    outcome = process_video(Job(path, path.name, "key", "who", "", 0, 16, Limits(), None, landmarker, scratch))
    assert not outcome.samples
    return ", ".join(entry["reason"] for entry in outcome.rejected)


def test_a_name_too_long_for_a_sidecar_has_none(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 251 + ".mp4")
    path.touch()
    assert find_sidecar(path) is None
