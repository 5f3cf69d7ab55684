"""Clips that were fetched, and whose annotation is another one now: what lies in their place must not pass for it."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from helpers.downloads import FAST, Fake, annotated, clip, files, lines, states
from rich.console import Console

from tools.download import table
from tools.download.reasons import ClipFailure, Reason
from tools.download.records import Clip, PixelRule
from tools.download.run import Options, download

MOVED = PixelRule(Fraction(0), Fraction(0), Fraction(64), Fraction(64), 144)


def failing(film: Path, reason: Reason) -> Fake:
    return Fake(film, {clip("a").video: [ClipFailure(reason, "ERROR: so it is")]})


@pytest.mark.parametrize("changed", [clip("a", end=3), replace(clip("a"), rule=MOVED)])
@pytest.mark.parametrize("reason", [Reason.REMOVED, Reason.NETWORK])
def test_old_file_is_put_aside_where_the_new_one_cannot_be_had(
    film: Path, tmp_path: Path, changed: Clip, reason: Reason
) -> None:
    download(annotated(clip("a"), clip("b")), tmp_path, Fake(film), FAST)
    old = (tmp_path / "clips" / "a.mp4").read_bytes()
    report = download(annotated(changed, clip("b")), tmp_path, failing(film, reason), replace(FAST, tries=1))
    assert states(report)["b"] == "there" and report.outcomes["a"].reason is reason
    assert files(tmp_path) == ["b.mp4"] and (tmp_path / "aside" / "a.mp4").read_bytes() == old
    notice, failure = lines(tmp_path)[-2:]
    assert (notice["clip"], notice["state"], notice["file"]) == ("a", "aside", "aside/a.mp4")
    assert (notice["made_of"], notice["annotated"]) == (clip("a").cut, changed.cut)
    assert failure["reason"] == reason
    table.write(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["missing"][0]["aside"] == "aside/a.mp4"
    assert json.loads((tmp_path / "identities.json").read_text()).keys() == {"b"}
    with Console(record=True, width=400) as console:
        table.show(report, tmp_path, console)
    assert f"1 clip of another annotation, or damaged, put aside in {tmp_path / 'aside'} (see" in console.export_text()


@pytest.mark.parametrize("options", [replace(FAST, limit=0), FAST])
def test_old_file_is_put_aside_before_anything_is_fetched(film: Path, tmp_path: Path, options: Options) -> None:
    """So that a run which is stopped, or has a limit, leaves none either; the new clip has the place to itself."""
    download(annotated(clip("a")), tmp_path, Fake(film), FAST)
    old = (tmp_path / "clips" / "a.mp4").read_bytes()
    report = download(annotated(clip("a", end=3)), tmp_path, Fake(film), options)
    got = options.limit is None
    assert states(report) == {"a": "got" if got else "untried"} and files(tmp_path) == ["a.mp4"] * got
    assert (tmp_path / "aside" / "a.mp4").read_bytes() == old
    download(annotated(clip("a")), tmp_path, Fake(film), FAST)
    download(annotated(clip("a", end=3)), tmp_path, Fake(film), FAST)
    kept = sorted(path.name for path in (tmp_path / "aside").iterdir())
    assert kept == ["a.2.mp4", *["a.3.mp4"] * got, "a.mp4"], "none is written over"


def test_old_file_beside_a_tombstone_of_an_earlier_version(film: Path, tmp_path: Path) -> None:
    """There the file stayed. The tombstone holds; with the old annotation the file is the clip."""
    old, new = annotated(clip("a")), annotated(clip("a", end=3))
    download(old, tmp_path, Fake(film), FAST)
    data = (tmp_path / "clips" / "a.mp4").read_bytes()
    download(new, tmp_path, failing(film, Reason.PRIVATE), FAST)
    (tmp_path / "aside" / "a.mp4").rename(tmp_path / "clips" / "a.mp4")
    fake = Fake(film)
    assert states(download(old, tmp_path, fake, FAST)) == {"a": "there"}
    assert states(download(new, tmp_path, fake, FAST)) == {"a": "gone private"} and not fake.asked
    assert not files(tmp_path) and (tmp_path / "aside" / "a.mp4").read_bytes() == data
    assert states(download(new, tmp_path, fake, FAST)) == {"a": "gone private"}, "a notice is no state of a clip"


def test_file_of_another_size_is_put_aside_too(film: Path, tmp_path: Path) -> None:
    download(annotated(clip("a")), tmp_path, Fake(film), FAST)
    (tmp_path / "clips" / "a.mp4").write_bytes(b"short")
    report = download(annotated(clip("a")), tmp_path, failing(film, Reason.REMOVED), FAST)
    assert states(report) == {"a": "gone removed"} and not files(tmp_path)
    assert (tmp_path / "aside" / "a.mp4").read_bytes() == b"short" and lines(tmp_path)[-2]["made_of"] is None
