"""The place of a clip in the output folder, and what lies there. A file that was cut by another annotation than the
present one, or is damaged, is put aside, so that nothing takes it for the clip."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tools.download.ledger import Ledger
from tools.download.records import Clip

CLIPS, ASIDE = "clips", "aside"


def file_of(out: Path, clip: Clip) -> Path:
    """Where a clip lies once it is complete. Its name was checked when it was read."""
    return out / CLIPS / f"{clip.name}.mp4"


def entry_of(out: Path, clip: Clip, ledger: Ledger) -> dict[str, Any] | None:
    """The ledger's entry of the file that lies there, if that is the clip, whole."""
    entry = ledger.got(clip.name)
    right = entry is not None and entry.get("cut") == clip.cut and _bytes(file_of(out, clip)) == entry.get("bytes")
    return entry if right else None


def put_aside(out: Path, clip: Clip, ledger: Ledger) -> str | None:
    """Take what is not the clip out of its place, with a notice in the ledger. Returns where files of this clip lie,
    below `out`, the last one; None where there is none, or where it has been removed by hand.

    A file that the ledger has never known stays: a run that was killed published it, and the next one writes it anew.
    """
    file, entry = file_of(out, clip), ledger.got(clip.name)
    size = _bytes(file)
    if entry is not None and size is not None:
        target = _free(out / ASIDE, clip.name)
        target.parent.mkdir(exist_ok=True)
        known = entry.get("cut") if size == entry.get("bytes") else None
        # The notice first: after a kill between the two the file lies where it was, and this is done again.
        ledger.add(clip.name, "aside", file=f"{ASIDE}/{target.name}", made_of=known, annotated=clip.cut)
        os.replace(file, target)
    notice = ledger.notice(clip.name)
    return notice["file"] if notice is not None and (out / notice["file"]).exists() else None


def _bytes(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None


def _free(folder: Path, name: str) -> Path:
    target, number = folder / f"{name}.mp4", 1
    while target.exists():
        number += 1
        target = folder / f"{name}.{number}.mp4"
    return target
