"""HDTF: four text files for each of RD, WDA and WRA, joined by name. `X_crop_ratio.txt` is for those who look for faces
themselves and is not read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Generic, TypeVar

from tools.download.records import (
    AnnotationError,
    Annotations,
    Clip,
    Collector,
    PixelRule,
    lines_of,
    number,
    safe_name,
    video_of,
)

SOURCE, LICENCE = "HDTF", "CC BY 4.0"
FOLDER = "HDTF_dataset"
PREFIXES = ("RD", "WDA", "WRA")
URLS, TIMES, CROPS, HEIGHTS = "video_url", "annotion_time", "crop_wh", "resolution"  # "annotion" is how it is spelt
MAX_HEIGHT = 10_000
TIME = re.compile(r"(?:([0-9]{1,2}):)?([0-9]{1,3}):([0-9]{2}(?:\.[0-9]{1,6})?)")
CLIP_KEY = re.compile(r"(.+)_([0-9]{1,4})")
TIME_FORM = "expected mm:ss-mm:ss or h:mm:ss-h:mm:ss, the end after the start"

Value = TypeVar("Value")


@dataclass(frozen=True)
class Row(Generic[Value]):
    """A value and the line it stands in."""

    line: int
    value: Value


class Part:
    """The files of one prefix."""

    def __init__(self, folder: Path, prefix: str, found: Collector) -> None:
        self.folder, self.prefix, self.found = folder, prefix, found
        self.urls = self._urls()
        self.times = self._times()
        self.crops = self._crops()
        self.heights = self._heights()

    def file(self, kind: str) -> str:
        """Name of one of the files."""
        return f"{self.prefix}_{kind}.txt"

    def clips(self) -> int:
        """Join the files by name, add the clips and note what has no partner. Returns how many could be joined."""
        for name, url in self.urls.items():
            if name not in self.times:
                self._alone(URLS, url.line, name, TIMES)
        joined = 0
        for name, times in self.times.items():
            if name not in self.urls:
                self._alone(TIMES, times.line, name, URLS)
            if name not in self.heights:
                self._alone(TIMES, times.line, name, HEIGHTS)
            for k, span in enumerate(times.value):
                joined += self._clip(name, k, times.line, span)
        for (name, k), crop in self.crops.items():
            if name not in self.times or k >= len(self.times[name].value):
                self._alone(CROPS, crop.line, f"{name}_{k}", TIMES, "range")
        return joined

    def _clip(self, name: str, k: int, line: int, span: tuple[Fraction, Fraction] | None) -> int:
        crop, url, height = self.crops.get((name, k)), self.urls.get(name), self.heights.get(name)
        if crop is None:
            self._alone(TIMES, line, f"{name}_{k}", CROPS)
        if span is None or crop is None:
            return 0
        if url is not None and height is not None:
            x, wide, y, high = crop.value
            rule = PixelRule(x, y, x + wide, y + high, height.value)
            clip = Clip(self._name(name, k), url.value, *span, rule, height.value)
            self.found.add(clip, self.file(TIMES), line)
        return 1

    def _name(self, name: str, k: int) -> str:
        # Names are unique within a prefix only.
        return f"{name}_{k}" if name.startswith(f"{self.prefix}_") else f"{self.prefix}_{name}_{k}"

    def _urls(self) -> dict[str, Row[str]]:
        rows: dict[str, Row[str]] = {}
        for line, text in lines_of(self.folder / self.file(URLS)):
            name, _, url = text.partition(" ") if " " in text else text.partition("\t")
            video = video_of(url.strip())
            if video is None:
                self._malformed(URLS, line, text, "expected `Name URL` with the address of a YouTube video")
            else:
                self._put(rows, URLS, line, name.strip(), video)
        return rows

    def _times(self) -> dict[str, Row[list[tuple[Fraction, Fraction] | None]]]:
        rows: dict[str, Row[list[tuple[Fraction, Fraction] | None]]] = {}
        for line, text in lines_of(self.folder / self.file(TIMES)):
            name, ranges = split_times(text)
            if not ranges:
                self._malformed(TIMES, line, text, f"expected `Name.mp4 RANGE ...`: {TIME_FORM}")
                continue
            spans = [parse_range(text) for text in ranges]
            for wrong in (text for text, span in zip(ranges, spans, strict=True) if span is None):
                self._malformed(TIMES, line, wrong, TIME_FORM)
            self._put(rows, TIMES, line, stem(name), spans)
        return rows

    def _crops(self) -> dict[tuple[str, int], Row[tuple[Fraction, ...]]]:
        rows: dict[tuple[str, int], Row[tuple[Fraction, ...]]] = {}
        for line, text in lines_of(self.folder / self.file(CROPS)):
            name, *values = text.split()
            key = CLIP_KEY.fullmatch(stem(name))
            numbers = [value for value in map(number, values) if value is not None]
            if key is None or len(values) != 4 or len(numbers) != 4 or numbers[1] <= 0 or numbers[3] <= 0:
                self._malformed(CROPS, line, text, "expected `Name_k.mp4 x width y height`, sizes above 0")
            else:
                self._put(rows, CROPS, line, (key.group(1), int(key.group(2))), tuple(numbers))
        return rows

    def _heights(self) -> dict[str, Row[int]]:
        rows: dict[str, Row[int]] = {}
        for line, text in lines_of(self.folder / self.file(HEIGHTS)):
            name, *values = text.split()
            height = number(values[0].removesuffix("p")) if len(values) == 1 else None
            if height is None or not 0 < height <= MAX_HEIGHT or height.denominator != 1:
                self._malformed(HEIGHTS, line, text, f"expected `Name.mp4 HEIGHT`, 1 to {MAX_HEIGHT} pixels")
            else:
                self._put(rows, HEIGHTS, line, stem(name), int(height))
        return rows

    def _put(self, rows: dict, kind: str, line: int, key: object, value: object) -> None:
        name = key[0] if isinstance(key, tuple) else str(key)
        shown = "_".join(map(str, key)) if isinstance(key, tuple) else name
        if not safe_name(name):
            self._malformed(kind, line, name, "expected a name that can be a file name")
        elif key in rows:
            self.found.problem("duplicate", self.file(kind), line, shown, "expected a name once; the first is used")
        else:
            rows[key] = Row(line, value)

    def _malformed(self, kind: str, line: int, value: str, expected: str) -> None:
        self.found.problem("malformed", self.file(kind), line, value, expected)

    def _alone(self, kind: str, line: int, value: str, other: str, what: str = "line") -> None:
        self.found.problem(
            "join", self.file(kind), line, value, f"expected a {what} of this name in {self.file(other)}"
        )


def read(path: Path) -> Annotations:
    """Clips of the folder HDTF_dataset, or of one that holds it. Raises AnnotationError without all its files."""
    if not path.is_dir():
        raise AnnotationError(f"{path}: no such folder: expected the folder {FOLDER}")
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    found = Collector()
    counts = dict.fromkeys(("urls", "annotated videos", "time ranges", "crop rows", "joined ranges"), 0)
    for prefix in PREFIXES:
        part = Part(folder, prefix, found)
        counts["urls"] += len(part.urls)
        counts["annotated videos"] += len(part.times)
        counts["time ranges"] += sum(len(times.value) for times in part.times.values())
        counts["crop rows"] += len(part.crops)
        counts["joined ranges"] += part.clips()
    return found.result(SOURCE, LICENCE, counts)


def stem(name: str) -> str:
    """A name without the `.mp4` that some of the files have."""
    return name[:-4] if name.lower().endswith(".mp4") else name


def split_times(text: str) -> tuple[str, list[str]]:
    """Name and ranges of a line; blanks around the dashes of the ranges do not count."""
    name, *rest = text.split(maxsplit=1)
    return name, re.sub(r"\s*[-\u2013]\s*", "-", rest[0]).split() if rest else []


def parse_range(text: str) -> tuple[Fraction, Fraction] | None:
    """`start-end` in seconds; None unless both are times and the end is after the start."""
    first, dash, last = text.partition("-")
    start, end = parse_time(first), parse_time(last)
    return (start, end) if dash and start is not None and end is not None and start < end else None


def parse_time(text: str) -> Fraction | None:
    """`mm:ss` or `h:mm:ss` in seconds; None for anything else."""
    found = TIME.fullmatch(text)
    if found is None:
        return None
    hours, minutes, seconds = int(found.group(1) or 0), int(found.group(2)), Fraction(found.group(3))
    if seconds >= 60 or (found.group(1) is not None and minutes >= 60):
        return None
    return 3600 * hours + 60 * minutes + seconds
