"""Which files are videos, and what they are called in the shards."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

# fmt: off
VIDEO_SUFFIXES = frozenset((
    ".mp4", ".m4v", ".mkv", ".mov", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".flv", ".wmv", ".3gp",
    ".ogv",
))
# fmt: on


def find_videos(folder: Path) -> list[Path]:
    """Video files under a folder by suffix, hidden files and folders left out, in the order of their names. A link to a
    file counts as the file, also a broken one; links to folders are not followed, so that a loop cannot arise. Pipes,
    sockets and devices are no files: they are left out. Raises NotADirectoryError.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: no such folder: expected a folder of videos")
    found: list[Path] = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(root) / name
            for name in files
            if not name.startswith(".")
            and Path(name).suffix.lower() in VIDEO_SUFFIXES
            and not _is_special(Path(root) / name)
        ]
    return sorted(found, key=lambda path: name_of(path, folder))


def _is_special(path: Path) -> bool:
    """Whether a path leads to something that is neither a file nor a broken link: reading it could wait for ever."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False


def name_of(path: Path, folder: Path) -> str:
    """The path inside the folder, with "/"; bytes that are not UTF-8 are written as escapes."""
    return path.relative_to(folder).as_posix().encode("utf-8", "backslashreplace").decode("utf-8")


def key_of(path: Path, sha256: str) -> str:
    """Start of the keys of a video's samples: its name in plain characters and the start of its content's hash."""
    plain = re.sub(r"[^A-Za-z0-9_]+", "-", path.stem).strip("-")[:40]
    return f"{plain or 'video'}-{sha256[:12]}"
