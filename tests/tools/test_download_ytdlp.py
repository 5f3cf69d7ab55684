"""The command line given to yt-dlp, its messages, and a stand-in program that behaves like it."""

from __future__ import annotations

import stat
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from tools.download import ytdlp
from tools.download.reasons import GONE, PASSING, ClipFailure, Reason, classify
from tools.download.ytdlp import SECTION, Request, ToolError, YtDlp, message_of

ID = "-aaaaaaaaa_"
ADDRESS = f"https://www.youtube.com/watch?v={ID}"


def request_for(folder: Path, video: str = ID) -> Request:
    return Request(video, 720, (Fraction(3, 2), Fraction(7, 3)), folder)


def test_command_line_of_a_section(tmp_path: Path) -> None:
    command = YtDlp(rate=5000, sleep=2.5, cookies=tmp_path / "c").command(request_for(tmp_path))
    assert command == [
        sys.executable, "-P", "-m", "yt_dlp",
        "--ignore-config", "--no-playlist", "--no-progress", "--no-mtime", "--no-cache-dir",
        "-f", "bestvideo[ext=mp4]+bestaudio[ext=m4a]/bestvideo+bestaudio",
        "--merge-output-format", "mp4", "--skip-unavailable-fragments", "--socket-timeout", "30",
        "-o", "source.%(ext)s",
        "-S", "res:720",
        "--download-sections", "*1.5-2.333333", "--force-keyframes-at-cuts",
        "--downloader-args", "ffmpeg_o:-fps_mode passthrough -enc_time_base:v 1:90000 -crf 14",
        "--sleep-interval", "2.5", "--limit-rate", "5000", "--cookies", "cookies.txt",
        "--", ADDRESS,
    ]  # fmt: skip


def test_command_line_of_a_whole_video(tmp_path: Path) -> None:
    command = YtDlp(sleep=0).command(Request(ID, None, None, tmp_path))
    assert command[-3:] == ["source.%(ext)s", "--", ADDRESS]


@pytest.mark.parametrize("video", ["--exec=ls", "", "a b", "aaaaaaaaaaa\n", "https://x.y/aaaaaaaaaaa"])
def test_id_that_is_none_never_reaches_the_command_line(tmp_path: Path, video: str) -> None:
    with pytest.raises(ToolError, match="YouTube id"):
        YtDlp().command(request_for(tmp_path, video))


def test_the_real_program_reads_the_command_as_meant(tmp_path: Path) -> None:
    yt_dlp = pytest.importorskip("yt_dlp", reason="yt-dlp is not installed (extra: download)")
    command = YtDlp(rate=5000, cookies=tmp_path / "c").command(request_for(tmp_path))
    parsed = yt_dlp.parse_options(command[4:])
    options = parsed.ydl_opts
    assert parsed.urls == [ADDRESS] and options["cookiefile"] == "cookies.txt" and options["ratelimit"] == 5000
    assert options["format_sort"] == ["res:720"] and options["force_keyframes_at_cuts"] is True
    assert options["external_downloader_args"] == {"ffmpeg_o": SECTION[-1].removeprefix("ffmpeg_o:").split()}
    (section,) = options["download_ranges"]({"duration": 100}, None)
    assert (section["start_time"], section["end_time"]) == (1.5, 2.333333)


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (Reason.PRIVATE, "Private video. Sign in if you've been granted access to this video"),
        (Reason.PRIVATE, "Video unavailable. This video is private"),
        (Reason.REMOVED, "Video unavailable"),
        (Reason.REMOVED, "Video unavailable. This video has been removed by the uploader"),
        (Reason.REMOVED, "This video has been removed for violating YouTube's Community Guidelines"),
        (Reason.REMOVED, "Unable to download webpage: HTTP Error 404: Not Found"),
        (Reason.TERMINATED, "Video unavailable. This video is no longer available because the YouTube account "
         "associated with this video has been terminated."),
        (Reason.TERMINATED, "This video is no longer available because the uploader has closed their YouTube account"),
        (Reason.COPYRIGHT, "This video is no longer available due to a copyright claim by Some Network"),
        (Reason.COUNTRY, "The uploader has not made this video available in your country"),
        (Reason.COUNTRY, "Video unavailable. This video contains content from X, who has blocked it in your country on "
         "copyright grounds"),
        (Reason.COUNTRY, "This video is not available from your location due to geo restriction"),
        (Reason.AGE, "Sign in to confirm your age. This video may be inappropriate for some users."),
        (Reason.MEMBERS, "Join this channel to get access to members-only content like this video"),
        (Reason.RATE_LIMIT, "Unable to download webpage: HTTP Error 429: Too Many Requests"),
        (Reason.RATE_LIMIT, "This content isn't available, try again later. The current session has been rate-limited"),
        (Reason.BOT_CHECK, "Sign in to confirm you\u2019re not a bot. Use --cookies"),
        (Reason.FORBIDDEN, "unable to download video data: HTTP Error 403: Forbidden"),
        (Reason.NETWORK, "Unable to download API page: [Errno -2] Name or service not known (caused by X)"),
        (Reason.NETWORK, "[Errno 104] Connection reset by peer"),
        (Reason.NETWORK, "HTTP Error 503: Service Unavailable"),
        (Reason.NETWORK, "1024 bytes read, 4096 more expected"),
        (Reason.TIMEOUT, "The read operation timed out"),
        (Reason.NO_FORMAT, "Requested format is not available. Use --list-formats"),
        (Reason.OTHER, "ffmpeg exited with code 1"),
        (Reason.OTHER, ""),
    ],
)  # fmt: skip
def test_messages_are_sorted(reason: Reason, message: str) -> None:
    assert classify(f"ERROR: [youtube] {ID}: {message}") is reason


def test_kinds_do_not_overlap() -> None:
    assert not GONE & PASSING and Reason.OTHER in PASSING and Reason.NO_FORMAT not in GONE | PASSING


def test_message_is_one_clean_line() -> None:
    text = "WARNING: 429\nERROR: first\n\x1b[31mred\nERROR: [youtube] x: Private\tvideo\x1b[0m\nlast\n"
    assert message_of(text) == "ERROR: [youtube] x: Private video [0m"
    assert message_of("only\nthis\n") == "this" and message_of("") == ""
    assert len(message_of("E" * 10_000)) == 500


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """A module yt_dlp that is found before any real one."""
    folder.mkdir()
    (folder / "yt_dlp.py").write_text(f"import pathlib, sys, time\nargv = sys.argv[1:]\n{body}\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))


def scratch_of(folder: Path) -> Path:
    path = folder / "with %(id)s and blank"
    path.mkdir()
    return path


def test_fetch_takes_the_finished_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
assert pathlib.Path("cookies.txt").read_text() == "secret"
pathlib.Path("cookies.txt").write_text("changed")
pathlib.Path("source.f137.mp4.part").write_text("half")
pathlib.Path("source.mp4").write_text(argv[-1])
"""
    stand_in(tmp_path / "lib", monkeypatch, body)
    cookies, scratch = tmp_path / "c", scratch_of(tmp_path)
    cookies.write_text("secret")
    path = YtDlp(cookies=cookies).fetch(request_for(scratch))
    assert path == scratch / "source.mp4" and path.read_text() == ADDRESS
    assert cookies.read_text() == "secret", "processes that run at a time must not share the file"
    assert stat.S_IMODE((scratch / "cookies.txt").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("body", "reason", "message"),
    [
        ("print('ERROR: [youtube] x: Private video', file=sys.stderr); sys.exit(1)", Reason.PRIVATE, "Private video"),
        ("pathlib.Path('source.mp4.part').touch()", Reason.OTHER, "code 0 and 0 files"),
        ("pathlib.Path('source.mp4').touch(); sys.exit(3)", Reason.OTHER, "code 3"),
        ("sys.stderr.buffer.write(b'ERROR: \\xff HTTP Error 429'); sys.exit(1)", Reason.RATE_LIMIT, "429"),
        ("time.sleep(60)", Reason.TIMEOUT, "did not end within 1.5 s"),
    ],
)
def test_fetch_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, reason: Reason, message: str
) -> None:
    stand_in(tmp_path / "lib", monkeypatch, body)
    with pytest.raises(ClipFailure) as error:
        YtDlp(timeout=1.5).fetch(request_for(scratch_of(tmp_path)))
    assert error.value.reason is reason and message in error.value.message


def test_full_disk_is_no_fault_of_the_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path / "lib", monkeypatch, "sys.exit('ERROR: [Errno 28] No space left on device')")
    with pytest.raises(OSError, match="No space left"):
        YtDlp().fetch(request_for(scratch_of(tmp_path)))


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    present = {"yt_dlp": False, "av": False, "ffmpeg": False}
    monkeypatch.setattr(ytdlp.importlib.util, "find_spec", lambda name: object() if present[name] else None)
    monkeypatch.setattr(ytdlp.shutil, "which", lambda name: "/bin/x" if present["ffmpeg"] else None)
    with pytest.raises(ToolError, match=r"pip install 'dualforce\[download\]'"):
        YtDlp().check()
    present["yt_dlp"] = True
    with pytest.raises(ToolError, match="PyAV is not installed"):
        YtDlp().check()
    present["av"] = True
    with pytest.raises(ToolError, match="ffmpeg: no such program"):
        YtDlp().check()
    present["ffmpeg"] = True
    with pytest.raises(ToolError, match=r"no such file: expected cookies"):
        YtDlp(cookies=tmp_path / "none").check()
    YtDlp().check()
