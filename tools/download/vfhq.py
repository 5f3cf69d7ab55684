"""VFHQ: one text file per clip, `Clip+<id>+P<person>+C<clip>+F<first>-<last>.txt`, with lines H, W, FPS and CROP."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path

from tools.download.records import AnnotationError, Annotations, Clip, Collector, PixelRule, lines_of, number

SOURCE, LICENCE = "VFHQ", "not stated with the annotations: see the publication"
NAME = re.compile(r"Clip\+([A-Za-z0-9_-]{11})\+P([0-9]{1,9})\+C([0-9]{1,9})\+F([0-9]{1,9})-([0-9]{1,9})")
NAME_FORM = "expected a file name Clip+<id>+P<person>+C<clip>+F<first>-<last>.txt, the last frame after the first"
FIELD = re.compile(r"(H|W|FPS|CROP)\b(.*)")
VALUES = {"H": 1, "W": 1, "FPS": 1, "CROP": 4}
SHORTEST = 4  # seconds
MAX_SIDE, MAX_FPS = 20_000, 1_000  # both from 1 on: a lower rate gives times that no reader of videos takes


class FileError(ValueError):
    """A file that gives no clip: (line, value, expected)."""


def read(path: Path) -> Annotations:
    """Clips of a folder of such files, searched with its subfolders. Raises AnnotationError if there is none."""
    if not path.is_dir():
        raise AnnotationError(f"{path}: no such folder: expected a folder of Clip+*.txt files")
    files = sorted(path.rglob("Clip+*.txt"))
    if not files:
        raise AnnotationError(f"{path}: no annotation file: expected Clip+*.txt in it")
    found = Collector()
    for file in files:
        try:
            clip = clip_of(file)
        except FileError as error:
            line, value, expected = error.args
            found.problem("malformed", file.name, line, value, expected)
            continue
        seconds = clip.end - clip.start
        if seconds < SHORTEST:
            found.problem("short", file.name, 1, f"{float(seconds):.2f} s", f"expected at least {SHORTEST} s")
        else:
            found.add(clip, file.name, 1)
    return found.result(SOURCE, LICENCE, {"files": len(files)})


def clip_of(file: Path) -> Clip:
    """The clip of one file. Raises FileError, and AnnotationError if it cannot be read."""
    name = NAME.fullmatch(file.stem)
    if name is None or int(name.group(4)) >= int(name.group(5)):
        raise FileError(0, file.name, NAME_FORM)
    fields = fields_of(file)
    width, height, rate = (fields[key][0] for key in ("W", "H", "FPS"))
    x0, y0, x1, y1 = fields["CROP"]
    # The published times take one frame more on either side.
    start = max(Fraction(int(name.group(4)) - 1) / rate, Fraction(0))
    end = Fraction(int(name.group(5)) + 1) / rate
    rule = PixelRule(x0, y0, x1, y1, int(height), int(width))
    return Clip(file.stem, name.group(1), start, end, rule, int(height))


def fields_of(file: Path) -> dict[str, list[Fraction]]:
    """Numbers of the lines H, W, FPS and CROP; other lines do not count. Raises FileError."""
    fields: dict[str, list[Fraction]] = {}
    lines: dict[str, int] = {}
    for line, text in lines_of(file):
        found = FIELD.match(text)
        if found is None:
            continue
        key = found.group(1)
        # Some files name the corners before the numbers: the last ones count.
        values = [number(word) for word in re.split(r"[\s,:=]+", found.group(2).strip())][-VALUES[key] :]
        numbers = [value for value in values if value is not None]
        if len(numbers) != VALUES[key]:
            raise FileError(line, text, f"expected {VALUES[key]} number{'s' if VALUES[key] > 1 else ''} behind {key}")
        fields[key], lines[key] = numbers, line
    for key in VALUES:
        if key not in fields:
            raise FileError(0, file.name, f"expected a line {key}")
    _check(fields, lines)
    return fields


def _check(fields: dict[str, list[Fraction]], lines: dict[str, int]) -> None:
    for key, highest in (("H", MAX_SIDE), ("W", MAX_SIDE), ("FPS", MAX_FPS)):
        value = fields[key][0]
        if not 1 <= value <= highest or (key != "FPS" and value.denominator != 1):
            kind = "a number" if key == "FPS" else "a whole number"
            raise FileError(lines[key], f"{key} {float(value):g}", f"expected {kind} from 1 to {highest}")
    x0, y0, x1, y1 = fields["CROP"]
    if x0 >= x1 or y0 >= y1:
        shown = " ".join(f"{float(value):g}" for value in fields["CROP"])
        raise FileError(lines["CROP"], f"CROP {shown}", "expected x0 < x1 and y0 < y1")
