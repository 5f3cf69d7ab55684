"""Fetching through yt-dlp, as a process of its own for each file."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Protocol

from tools.download.reasons import ClipFailure, Reason, classify
from tools.download.records import VIDEO_ID

# fmt: off
BASE = (
    "--ignore-config", "--no-playlist", "--no-progress", "--no-mtime", "--no-cache-dir",
    "-f", "bestvideo[ext=mp4]+bestaudio[ext=m4a]/bestvideo+bestaudio",
    "--merge-output-format", "mp4", "--skip-unavailable-fragments", "--socket-timeout", "30",
    "-o", "source.%(ext)s",
)
# fmt: on
# Sections are encoded by ffmpeg: by default on a grid of the frame rate that begins at the section's start, which moves
# the pictures by up to half of their distance against the sound. The quality is high, as this is not the last encoding.
SECTION = (
    "--force-keyframes-at-cuts",
    "--downloader-args",
    "ffmpeg_o:-fps_mode passthrough -enc_time_base:v 1:90000 -crf 14",
)
UNFINISHED = (".part", ".ytdl", ".temp")


class ToolError(ValueError):
    """A program or option without which nothing can be fetched; one line for the user."""


@dataclass(frozen=True)
class Request:
    """A video to fetch into an empty folder: all of it, or the `section` (start, end) in seconds."""

    video: str
    height: int | None
    section: tuple[Fraction, Fraction] | None
    folder: Path


class Fetcher(Protocol):
    """Brings one file."""

    def fetch(self, request: Request) -> Path:
        """Path of the file, inside the request's folder; time 0 of it is the section's start. Raises ClipFailure, and
        OSError when this machine is at fault."""
        ...


@dataclass(frozen=True)
class YtDlp:
    """`rate`: bytes a second of one process; `sleep`: seconds before each download; `timeout`: seconds for one file."""

    rate: int | None = None
    sleep: float = 2.0
    cookies: Path | None = None
    timeout: float = 3600.0

    def check(self) -> None:
        """Raise ToolError if something is missing."""
        for module, name in (("yt_dlp", "yt-dlp"), ("av", "PyAV")):
            if importlib.util.find_spec(module) is None:
                raise ToolError(f"{name} is not installed: pip install 'dualforce[download]'")
        if shutil.which("ffmpeg") is None:
            raise ToolError("ffmpeg: no such program: yt-dlp needs it to cut sections and to join picture and sound")
        if self.cookies is not None and not self.cookies.is_file():
            raise ToolError(f"{self.cookies}: no such file: expected cookies in Netscape format")

    def command(self, request: Request) -> list[str]:
        """The command line, to be run in the request's folder."""
        if not VIDEO_ID.fullmatch(request.video):
            raise ToolError(f"{request.video!a}: expected the 11 characters of a YouTube id")
        # -P: the folder it runs in is filled from the network and must not be searched for modules.
        words = [sys.executable, "-P", "-m", "yt_dlp", *BASE]
        if request.height is not None:
            words += ["-S", f"res:{request.height}"]
        if request.section is not None:
            start, end = (seconds_text(time) for time in request.section)
            words += ["--download-sections", f"*{start}-{end}", *SECTION]
        if self.sleep > 0:
            words += ["--sleep-interval", f"{self.sleep:g}"]
        if self.rate is not None:
            words += ["--limit-rate", str(self.rate)]
        if self.cookies is not None:
            words += ["--cookies", "cookies.txt"]
        # A full address after "--": an id may begin with "-".
        return [*words, "--", f"https://www.youtube.com/watch?v={request.video}"]

    def fetch(self, request: Request) -> Path:
        """See Fetcher."""
        if self.cookies is not None:
            self._copy_cookies(request.folder)
        try:
            done = subprocess.run(
                self.command(request),
                cwd=request.folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=self.timeout,
                text=True,
                errors="backslashreplace",
            )
        except subprocess.TimeoutExpired:
            raise ClipFailure(Reason.TIMEOUT, f"yt-dlp did not end within {self.timeout:g} s") from None
        files = finished(request.folder)
        if done.returncode == 0 and len(files) == 1:
            return files[0]
        message = message_of(done.stderr) or f"yt-dlp ended with code {done.returncode} and {len(files)} files"
        if "No space left on device" in done.stderr:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(request.folder))
        raise ClipFailure(classify(message), message)

    def _copy_cookies(self, folder: Path) -> None:
        # yt-dlp writes its cookies back at the end: processes that share one file would spoil it.
        copy = folder / "cookies.txt"
        copy.touch(mode=0o600)
        copy.write_bytes(self.cookies.read_bytes() if self.cookies else b"")


def finished(folder: Path) -> list[Path]:
    """What yt-dlp left under its final name."""
    return [path for path in sorted(folder.glob("source.*")) if path.suffix not in UNFINISHED]


def message_of(text: str) -> str:
    """The last error of yt-dlp's output, else its last line, in one line without control characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")]
    last = (errors or lines or [""])[-1]
    return re.sub(r"[\x00-\x1f\x7f]+", " ", last)[:500]


def seconds_text(time: Fraction) -> str:
    """Seconds as a decimal number, to the microsecond."""
    return f"{float(time):.6f}".rstrip("0").rstrip(".")
