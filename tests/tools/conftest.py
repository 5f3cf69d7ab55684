"""What the tests of the download tools share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from helpers.numbered_clip import numbered_clip


@pytest.fixture(scope="session")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds; what the fake downloader brings."""
    return numbered_clip(tmp_path_factory.mktemp("film") / "film.mp4", 75)


@pytest.fixture
def ffmpeg(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """yt-dlp is installed, and there is a program ffmpeg: the machine's, or that of the extra `dev`."""
    pytest.importorskip("yt_dlp", reason="yt-dlp is not installed (extra: download)")
    if shutil.which("ffmpeg") is None:
        package = pytest.importorskip("imageio_ffmpeg", reason="ffmpeg is not installed (extra: dev)")
        folder = tmp_path_factory.mktemp("bin")
        (folder / "ffmpeg").symlink_to(package.get_ffmpeg_exe())
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
