"""What an annotation file says, in one form for all sets: clips, crop rules, and what is wrong with its lines.

Everything in these files is untrusted: names become file names and ids go to a downloader's command line, so both are
checked here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Protocol

MAX_NAME = 200  # bytes; a file system takes 255, and ".mp4" comes behind
VIDEO_ID = re.compile(r"[A-Za-z0-9_-]{11}")
NUMBER = re.compile(r"[+-]?[0-9]{1,9}(\.[0-9]{1,20})?")  # a double of 24000 / 1001 has 15 decimals
URL = re.compile(
    r"(?:https?://)?(?:www\.|m\.)?(?:youtube\.com/watch\?(?:[^\s#]*&)?v=|youtube\.com/(?:embed|v|shorts)/|youtu\.be/)"
    r"([A-Za-z0-9_-]{11})(?![A-Za-z0-9_-])\S*"
)


class AnnotationError(ValueError):
    """Annotations that cannot be used at all: `path: what: expected`."""


@dataclass(frozen=True)
class Box:
    """A crop in whole pixels of one picture. Even throughout, as colour has half the resolution of brightness."""

    x: int
    y: int
    width: int
    height: int


class CropRule(Protocol):
    """How a crop follows from the size of the real picture."""

    def box(self, width: int, height: int) -> Box | None:
        """The crop in a picture of `width` x `height` pixels; None where nothing of it is inside."""
        ...


@dataclass(frozen=True)
class PixelRule:
    """Corners in pixels of a picture of `height` (and `width`; None: of the same shape as the real one)."""

    x0: Fraction
    y0: Fraction
    x1: Fraction
    y1: Fraction
    height: int
    width: int | None = None

    def box(self, width: int, height: int) -> Box | None:
        down = Fraction(height, self.height)
        across = Fraction(width, self.width) if self.width else down
        return even_box(self.x0 * across, self.y0 * down, self.x1 * across, self.y1 * down, width, height)


@dataclass(frozen=True)
class SquareRule:
    """A face box in shares of the picture, made larger by `expand` on each side and then square about its middle."""

    top: Fraction
    bottom: Fraction
    left: Fraction
    right: Fraction
    expand: Fraction = Fraction(2, 100)

    def box(self, width: int, height: int) -> Box | None:
        top, bottom = (round(edge * height) for edge in self._grown(self.top, self.bottom))
        left, right = (round(edge * width) for edge in self._grown(self.left, self.right))
        half = min(bottom - top, right - left) // 2
        x, y = Fraction(left + right, 2), Fraction(top + bottom, 2)
        return even_box(x - half, y - half, x + half, y + half, width, height)

    def _grown(self, low: Fraction, high: Fraction) -> tuple[Fraction, Fraction]:
        return max(low - self.expand, Fraction(0)), min(high + self.expand, Fraction(1))


def even_box(x0: Fraction, y0: Fraction, x1: Fraction, y1: Fraction, width: int, height: int) -> Box | None:
    """The corners cut off at the picture's edges and put on even pixels; None below 2 x 2 pixels."""
    left, right = _even_span(x0, x1, width)
    top, bottom = _even_span(y0, y1, height)
    if right <= left or bottom <= top:
        return None
    return Box(left, top, right - left, bottom - top)


def _even_span(low: Fraction, high: Fraction, size: int) -> tuple[int, int]:
    """The nearest even start and even length inside [0, size); equal corners give equal lengths everywhere."""
    low, high = max(low, Fraction(0)), min(high, Fraction(size))
    length = 2 * round((high - low) / 2)
    start = 2 * round(low / 2)
    while start > 0 and start + length > size:
        start -= 2
    return start, min(start + length, size // 2 * 2)


@dataclass(frozen=True)
class Clip:
    """One clip to make: [start, end) seconds of a video, cropped. `height`: picture height to ask for, in pixels."""

    name: str
    video: str
    start: Fraction
    end: Fraction
    rule: CropRule
    height: int | None

    @property
    def cut(self) -> str:
        """What the clip is made of, as text: a clip made by another annotation is not this one."""
        return f"{self.video} {self.start}-{self.end} {self.rule}"


@dataclass(frozen=True)
class Problem:
    """A line that gives no clip. `kind`: malformed, duplicate, join (no partner in another file) or short."""

    kind: str
    file: str
    line: int
    value: str
    expected: str

    def __str__(self) -> str:
        # As ASCII: what comes from the file must not move the cursor or end the line.
        return f"{self.file}:{self.line}: {self.value[:120]!a}: {self.expected}"


@dataclass(frozen=True)
class Annotations:
    """All that the files of a set say. `counts` are of the files as published, `licence` is that of the annotations."""

    source: str
    licence: str
    clips: tuple[Clip, ...]
    problems: tuple[Problem, ...]
    counts: Mapping[str, int] = field(default_factory=dict)


class Collector:
    """Gathers clips and problems; a second clip of one name is a problem."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self._clips: dict[str, Clip] = {}

    def add(self, clip: Clip, file: str, line: int) -> None:
        """Take a clip unless its name cannot be a file name or is taken."""
        if not safe_name(clip.name):
            self.problem("malformed", file, line, clip.name, "expected a name that can be a file name")
        elif clip.name in self._clips:
            self.problem("duplicate", file, line, clip.name, "expected a name once; the first is used")
        else:
            self._clips[clip.name] = clip

    def problem(self, kind: str, file: str, line: int, value: object, expected: str) -> None:
        """Note what is wrong with a line."""
        self.problems.append(Problem(kind, file, line, str(value), expected))

    def result(self, source: str, licence: str, counts: Mapping[str, int]) -> Annotations:
        """Everything gathered."""
        return Annotations(source, licence, tuple(self._clips.values()), tuple(self.problems), dict(counts))


def safe_name(name: str) -> bool:
    """Whether a name can be a file's name: printable, no separator, not hidden, not too long. A leading "-" or "_" is
    usual in YouTube ids and is no harm, because paths are never passed without their folder."""
    return (
        bool(name)
        and name.isprintable()
        and name == name.strip()
        and not name.startswith(".")
        and not any(character in name for character in '/\\:*?"<>|')
        and len(name.encode()) <= MAX_NAME
    )


def video_of(url: str) -> str | None:
    """The id in a YouTube address; None for anything else."""
    found = URL.fullmatch(url)
    return found.group(1) if found else None


def number(text: str) -> Fraction | None:
    """A plain decimal number; None for anything else."""
    return Fraction(text) if NUMBER.fullmatch(text) else None


def read_text(path: Path) -> str:
    """An annotation file as text with `\\n` line ends, without byte-order mark. Raises AnnotationError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AnnotationError(f"{path}: {error.strerror}: expected an annotation file") from None
    # A wrong byte becomes an escape with a backslash, which no name may have: the line is reported, not the file.
    text = data.decode("utf-8-sig", errors="backslashreplace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text without outer blanks) of every line that is not blank. Raises AnnotationError."""
    for index, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield index, line.strip()
