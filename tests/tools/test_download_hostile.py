"""Rows of annotations that no published file should have: each gives a clip or ends with a reason, none with a
traceback. The film has 75 pictures of 192 x 144 at 25 a second."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.downloads import FAST, Fake

from tools.download import celebvhq, hdtf, vfhq
from tools.download.records import Annotations
from tools.download.run import download

ID = "a" * 11
WORDS = (
    "",
    "nan",
    "inf",
    "-inf",
    "None",
    "x",
    "-1",
    "0",
    "-0",
    "1e9",
    "1e-320",
    "9" * 11,
    "9" * 9,
    "0." + "0" * 19 + "1",
)
VALUES = (None, math.nan, math.inf, -math.inf, -1, -0.0, 1e-320, 1e300, 10**400, "", "1", True, [], {}, [ID], {"a": 1})

# Corners of a picture of 192 x 144 -> what is left of them; None: nothing is.
CROPS: dict[tuple[int, int, int, int], tuple[int, int] | None] = {
    (-20, -20, 50, 40): (50, 40),
    (150, 100, 400, 400): (42, 44),
    (-999, -999, 9999, 9999): (192, 144),
    (190, 142, 192, 144): (2, 2),
    (192, 0, 300, 144): None,
    (0, 144, 192, 300): None,
    (-50, -50, -10, -10): None,
    (0, 0, 1, 1): None,
}


def with_value(row: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """A copy of `row` with another value at a place such as "bbox.top"."""
    name, _, rest = place.partition(".")
    return {**row, name: with_value(row[name], rest, value) if rest else value}


def celebvhq_rows(folder: Path) -> tuple[int, Annotations]:
    good = {"ytb_id": ID, "duration": {"start_sec": 1, "end_sec": 2},
            "bbox": {"top": 0.2, "bottom": 0.8, "left": 0.2, "right": 0.8}}  # fmt: skip
    places = ["ytb_id", "duration", "bbox", *(f"{k}.{n}" for k in ("duration", "bbox") for n in good[k])]  # type: ignore[attr-defined]
    rows = [with_value(good, place, value) for place in places for value in VALUES]
    rows += VALUES  # type: ignore[arg-type]
    (folder / celebvhq.FILE).write_text(json.dumps({"clips": {f"c_{k}": row for k, row in enumerate(rows)}}))
    return len(rows), celebvhq.read(folder)


def vfhq_rows(folder: Path) -> tuple[int, Annotations]:
    good = {"H": "144", "W": "192", "FPS": "25", "CROP": "20 20 120 100"}
    rows = [good | {key: value} for key in ("H", "W", "FPS") for value in WORDS]
    corners = good["CROP"].split()
    rows += [good | {"CROP": " ".join([*corners[:k], word, *corners[k + 1 :]])} for k in range(4) for word in WORDS]
    for k, row in enumerate(rows):
        text = "".join(f"{key} {value}\n" for key, value in row.items())
        (folder / f"Clip+{ID}+P0+C{k}+F10-120.txt").write_text(text)
    spans = ("20-10", "10-10", "0-999999999", "999999000-999999999", "-", "x-y")
    for span in spans:
        (folder / f"Clip+{ID}+P1+C0+F{span}.txt").write_text("".join(f"{k} {v}\n" for k, v in good.items()))
    return len(rows) + len(spans), vfhq.read(folder)


def hdtf_files(folder: Path, rows: list[tuple[str, str, str, str]]) -> Annotations:
    """(address, range, x width y height, height of the picture) of each video, all of the first part."""
    kinds = ((hdtf.URLS, ""), (hdtf.TIMES, ".mp4"), (hdtf.CROPS, "_0.mp4"), (hdtf.HEIGHTS, ".mp4"))
    for prefix in hdtf.PREFIXES:
        for column, (kind, ending) in enumerate(kinds):
            lines = [f"n{k}{ending} {row[column]}\n" for k, row in enumerate(rows)] if prefix == "RD" else []
            (folder / f"{prefix}_{kind}.txt").write_text("".join(lines))
    return hdtf.read(folder)


def hdtf_rows(folder: Path) -> tuple[int, Annotations]:
    good = (f"https://youtu.be/{ID}", "00:01-00:02", "20 100 20 80", "144")
    spans = [span for word in WORDS for span in (word, f"{word}-00:02", f"00:01-{word}")]
    spans += ["00:02-00:01", "00:01-00:01", "99:59:59-99:59:59.5", "999:00-999:01", "00:01-00:01.000001"]
    crops = [[*good[2].split()[:k], word, *good[2].split()[k + 1 :]] for k in range(4) for word in WORDS]
    rows = [(word, *good[1:]) for word in WORDS] + [(*good[:3], word) for word in WORDS]
    rows += [(good[0], span, *good[2:]) for span in spans] + [(*good[:2], " ".join(crop), good[3]) for crop in crops]
    return len(rows), hdtf_files(folder, rows)


@pytest.mark.parametrize("rows_of", [celebvhq_rows, vfhq_rows, hdtf_rows])
def test_a_bad_row_is_a_reason(film: Path, tmp_path: Path, rows_of: Callable[[Path], tuple[int, Annotations]]) -> None:
    (tmp_path / "in").mkdir()
    count, found = rows_of(tmp_path / "in")
    assert len(found.clips) + len(found.problems) >= count and all("\n" not in str(p) for p in found.problems)
    report = download(found, tmp_path / "out", Fake(film), replace(FAST, workers=2, whole=True))
    reasons = {str(outcome.reason) for outcome in report.outcomes.values() if outcome.state != "got"}
    assert reasons <= {"crop", "length"}, "a library's own words are no reason"
    assert len(found.problems) > count / 2 and len(report.outcomes) == len(found.clips) > 5


def test_crop_over_the_edge_is_what_is_inside_and_one_outside_a_reason(film: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    rows = [
        (f"https://youtu.be/{ID}", "00:01-00:02", f"{x0} {x1 - x0} {y0} {y1 - y0}", "144") for x0, y0, x1, y1 in CROPS
    ]
    found = hdtf_files(tmp_path / "in", rows)
    assert not found.problems
    report = download(found, tmp_path / "out", Fake(film), replace(FAST, whole=True))
    entries = [json.loads(line) for line in (tmp_path / "out" / "ledger.jsonl").read_text().splitlines()]
    made = {entry["clip"]: (entry["width"], entry["height"]) for entry in entries if entry["state"] == "got"}
    assert [made.get(clip.name) for clip in found.clips] == list(CROPS.values())
    outside = [report.outcomes[clip.name] for clip, size in zip(found.clips, CROPS.values(), strict=True) if not size]
    assert {(o.state, str(o.reason), o.message) for o in outside} == {
        ("failed", "crop", "the crop lies outside the picture of 192 x 144")
    }
