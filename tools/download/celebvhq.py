"""CelebV-HQ: one JSON file, `{"clips": {"<id>_<k>": {"ytb_id", "duration", "bbox", ...}}}`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from tools.download.records import VIDEO_ID, AnnotationError, Annotations, Clip, Collector, SquareRule, read_text

SOURCE, LICENCE = "CelebV-HQ", "non-commercial research only"
FILE = "celebvhq_info.json"
HEIGHT = 1080  # pixels; boxes are shares of the picture, so any height fits, and more adds nothing to a face crop
MAX_SECONDS = 1_000_000
KEY = re.compile(r'"([^"\\]*(?:\\.[^"\\]*)*)"\s*:')


class FieldError(ValueError):
    """A field of an entry that cannot be used: `name = value: expected`."""


def read(path: Path) -> Annotations:
    """Clips of celebvhq_info.json, or of the folder that holds it. Raises AnnotationError if it is not that file."""
    file = path / FILE if path.is_dir() else path
    text = read_text(file)
    found = Collector()
    lines = lines_of_keys(text)
    clips = _entries(file, text, lines, found)
    for key, entry in clips.items():
        line = lines.get(key, 1)
        try:
            found.add(clip_of(key, entry), file.name, line)
        except FieldError as error:
            found.problem("malformed", file.name, line, key, str(error))
    ids = (entry.get("ytb_id") for entry in clips.values() if isinstance(entry, dict))
    videos = {video for video in ids if isinstance(video, str)}
    return found.result(SOURCE, LICENCE, {"clips": len(clips), "videos": len(videos)})


def _entries(file: Path, text: str, lines: Mapping[str, int], found: Collector) -> Mapping[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                line = lines.get(key, 1)
                found.problem("duplicate", file.name, line, key, "expected a key once; the first is used")
            values.setdefault(key, value)
        return values

    try:
        content = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"{file}: {error}: expected JSON") from None
    clips = content.get("clips") if isinstance(content, dict) else None
    if not isinstance(clips, dict):
        raise AnnotationError(f'{file}: no "clips": expected an object {{"clips": {{NAME: ...}}}}')
    return clips


def clip_of(key: str, entry: Any) -> Clip:
    """The clip of one entry. Raises FieldError."""
    video = _part(entry, "entry").get("ytb_id")
    if not isinstance(video, str) or not VIDEO_ID.fullmatch(video):
        raise FieldError(f"ytb_id = {video!a}: expected the 11 characters of a YouTube id")
    times = _part(entry.get("duration"), "duration")
    start, end = (_value(times, f"duration.{name}", MAX_SECONDS) for name in ("start_sec", "end_sec"))
    if start >= end:
        raise FieldError(f"duration = {float(start)}..{float(end)} s: expected the end after the start")
    box = _part(entry.get("bbox"), "bbox")
    top, bottom, left, right = (_value(box, f"bbox.{name}", 1) for name in ("top", "bottom", "left", "right"))
    if top >= bottom or left >= right:
        raise FieldError("bbox: expected top < bottom and left < right")
    return Clip(key, video, start, end, SquareRule(top, bottom, left, right), HEIGHT)


def lines_of_keys(text: str) -> dict[str, int]:
    """Number of the line in which each key first stands, as it is written: one with escapes is not found by its name.
    In one pass: the published file has some 36,000 entries."""
    lines: dict[str, int] = {}
    line, seen = 1, 0
    for found in KEY.finditer(text):
        line, seen = line + text.count("\n", seen, found.start()), found.start()
        lines.setdefault(found.group(1), line)
    return lines


def _part(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FieldError(f"{name} = {str(value)[:40]!a}: expected an object")
    return value


def _value(values: dict[str, Any], name: str, highest: int) -> Fraction:
    value = values.get(name.rpartition(".")[2])
    # JSON of this kind may hold NaN, which alone differs from itself, and integers too large for a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise FieldError(f"{name} = {str(value)[:40]!a}: expected a number")
    if not 0 <= value <= highest:
        raise FieldError(f"{name} = {str(value)[:40]}: expected 0 to {highest}")
    return Fraction(str(value))
