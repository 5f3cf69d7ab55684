"""Whole runs with a fake downloader: what is got, kept, remembered, tried again and counted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from helpers.downloads import FAST, Fake, annotated, clip, files, lines, states
from helpers.numbered_clip import number_in, number_place, pictures_of

from tools.download import run as running
from tools.download import table
from tools.download.ledger import Ledger, LedgerError
from tools.download.reasons import GONE, PASSING, ClipFailure, Reason
from tools.download.records import Annotations, Clip, PixelRule
from tools.download.run import download
from tools.download.ytdlp import Request

ROOT = Path(__file__).resolve().parents[2]


def test_clips_are_cut_from_their_sections(film: Path, tmp_path: Path) -> None:
    fake = Fake(film)
    report = download(annotated(clip("a", start=100, end=101), clip("b", start=0, end=2)), tmp_path, fake, FAST)
    assert states(report) == {"a": "got", "b": "got"} and files(tmp_path) == ["a.mp4", "b.mp4"]
    assert [request.section for request in fake.asked] == [(99, 102), (0, 3)]
    top, left = number_place((192, 144))
    shown = {name: [number_in(image, top - 30, left - 40) for _, image in pictures_of(tmp_path / "clips" / name)]
             for name in files(tmp_path)}  # fmt: skip
    assert shown == {"a.mp4": list(range(25, 50)), "b.mp4": list(range(50))}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "clips", "ledger.jsonl"]
    first = lines(tmp_path)[0]
    assert (first["clip"], first["state"], first["frames"], first["width"], first["height"]) == (
        "a",
        "got",
        25,
        128,
        96,
    )
    assert first["bytes"] == (tmp_path / "clips" / "a.mp4").stat().st_size and first["annotation_licence"] == "CC0-1.0"


def test_whole_videos_are_fetched_once(film: Path, tmp_path: Path) -> None:
    fake = Fake(film)
    clips = annotated(clip("a", "v" * 11, 0, 1), clip("b", "v" * 11, 1, 3), clip("c", "w" * 11, 0, 2))
    report = download(clips, tmp_path, fake, replace(FAST, whole=True))
    assert set(states(report).values()) == {"got"} and len(fake.asked) == 2
    assert {request.section for request in fake.asked} == {None}


def test_second_run_asks_for_nothing(film: Path, tmp_path: Path) -> None:
    clips = annotated(clip("a"), clip("b"))
    download(clips, tmp_path, Fake(film), FAST)
    fake = Fake(film)
    assert states(download(clips, tmp_path, fake, FAST)) == {"a": "there", "b": "there"}
    assert not fake.asked


def test_clip_that_was_changed_or_lost_is_made_again(film: Path, tmp_path: Path) -> None:
    download(annotated(clip("a"), clip("b"), clip("c")), tmp_path, Fake(film), FAST)
    (tmp_path / "clips" / "a.mp4").unlink()
    (tmp_path / "clips" / "b.mp4").write_bytes(b"short")
    fake = Fake(film)
    again = download(annotated(clip("a"), clip("b"), clip("c", end=3)), tmp_path, fake, FAST)
    assert states(again) == {"a": "got", "b": "got", "c": "got"}, "c has another end in the annotations"


@pytest.mark.parametrize("reason", sorted(GONE))
def test_gone_is_a_tombstone(film: Path, tmp_path: Path, reason: Reason) -> None:
    clips = annotated(clip("a", "v" * 11), clip("b", "v" * 11), clip("c"))
    fake = Fake(film, {"v" * 11: [ClipFailure(reason, "ERROR: so it is")]})
    assert states(download(clips, tmp_path, fake, FAST)) == {"a": f"gone {reason}", "b": f"gone {reason}", "c": "got"}
    assert fake.videos.count("v" * 11) == 1, "what is gone for one clip of a video is gone for all"
    stone = lines(tmp_path)[0]
    assert (stone["state"], stone["reason"], stone["message"]) == ("gone", reason, "ERROR: so it is")
    assert stone["date"][:4].isdigit() and stone["date"].endswith("+00:00")
    fake = Fake(film)
    later = download(clips, tmp_path, fake, FAST)
    assert states(later)["a"] == f"gone {reason}" and not fake.asked
    assert stone["date"][:10] in later.outcomes["a"].message
    assert set(states(download(clips, tmp_path, fake, replace(FAST, retry_gone=True))).values()) == {"got", "there"}


@pytest.mark.parametrize("reason", sorted(PASSING))
def test_passing_error_is_tried_again_later_each_time(film: Path, tmp_path: Path, reason: Reason) -> None:
    waits: list[float] = []
    fake = Fake(film, {f"{'a':_<11}": [ClipFailure(reason, "x") for _ in range(3)]})
    report = download(annotated(clip("a")), tmp_path, fake, replace(FAST, wait=2.0), pause=waits.append)
    assert states(report) == {"a": "got"} and len(fake.asked) == 4
    assert [round(wait) for wait in waits] == [2, 8, 32]
    assert [line["state"] for line in lines(tmp_path)] == ["got"]


def test_passing_error_that_stays_fails_until_the_next_run(film: Path, tmp_path: Path) -> None:
    fake = Fake(film, {f"{'a':_<11}": [ClipFailure(Reason.NETWORK, "x") for _ in range(4)]})
    clips = annotated(clip("a"), clip("b"))
    assert states(download(clips, tmp_path, fake, FAST)) == {"a": "failed network", "b": "got"}
    assert states(download(clips, tmp_path, fake, FAST)) == {"a": "got", "b": "there"}


def test_gone_after_a_passing_error(film: Path, tmp_path: Path) -> None:
    acts: list[BaseException] = [ClipFailure(Reason.TIMEOUT, "x"), ClipFailure(Reason.REMOVED, "y")]
    fake = Fake(film, {f"{'a':_<11}": acts})
    assert states(download(annotated(clip("a")), tmp_path, fake, FAST)) == {"a": "gone removed"}


def test_rate_limit_holds_all_workers(film: Path, tmp_path: Path) -> None:
    pacer_waits: list[float] = []
    pacer = running.Pacer(pacer_waits.append)
    pacer.wait()
    pacer.hold(50)
    pacer.hold(10)
    pacer.wait()
    assert [round(wait) for wait in pacer_waits] == [50]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (clip("w", end=9), Reason.LENGTH),
        (replace(clip("w"), rule=PixelRule(*map(Fraction, (500, 0, 600, 90)), 144)), Reason.CROP),
    ],
)
def test_clip_that_cannot_be_cut_stops_no_other(film: Path, tmp_path: Path, wrong: Clip, reason: Reason) -> None:
    report = download(annotated(wrong, clip("b")), tmp_path, Fake(film), FAST)
    assert states(report) == {"w": f"failed {reason}", "b": "got"} and files(tmp_path) == ["b.mp4"]


def test_strange_fault_of_a_library_stops_no_other(film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = running.cut, [0]

    def once(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 1:
            raise RuntimeError("odd")
        return real(*arguments)

    monkeypatch.setattr(running, "cut", once)
    report = download(annotated(clip("a"), clip("b")), tmp_path, Fake(film), FAST)
    assert states(report) == {"a": "failed internal", "b": "got"}


def test_workers_run_side_by_side(film: Path, tmp_path: Path) -> None:
    clips = annotated(*(clip(f"c{k}") for k in range(8)))
    fake = Fake(film)
    fake.meet = threading.Barrier(4)
    report = download(clips, tmp_path, fake, replace(FAST, workers=4))
    assert set(states(report).values()) == {"got"} and fake.most == 4 and len(lines(tmp_path)) == 8
    assert len({request.folder for request in fake.asked}) == 8


def test_limit_counts_what_is_not_there_yet(film: Path, tmp_path: Path) -> None:
    clips, two = annotated(*(clip(f"c{k}") for k in range(5))), replace(FAST, limit=2)
    assert sorted(states(download(clips, tmp_path, Fake(film), two)).values()) == ["got"] * 2 + ["untried"] * 3
    assert len(files(tmp_path)) == 2
    download(clips, tmp_path, Fake(film), two)
    assert len(files(tmp_path)) == 4


@pytest.mark.parametrize("name", ["-rf", "--exec", "_x", "-aaaaaaaaaa_0", "a b", "Clip+-x+P0", "\u00fc", "'; ls #"])
def test_names_that_look_like_options_are_files(film: Path, tmp_path: Path, name: str) -> None:
    report = download(annotated(clip(name, "-" + "v" * 10)), tmp_path, Fake(film), FAST)
    assert states(report) == {name: "got"} and files(tmp_path) == [f"{name}.mp4"]


class Killed(BaseException):
    """Stands for the end of the process."""


def kill(*_: Any, **__: Any) -> Any:
    raise Killed


@pytest.mark.parametrize("victim", range(3))
@pytest.mark.parametrize(
    "point", ["fetch", "tools.download.run.cut", "tools.download.run.publish", "tools.download.ledger.Ledger._append"]
)
def test_killed_run_goes_on(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, victim: int
) -> None:
    clips = annotated(*(clip(f"c{k}") for k in range(3)))
    fake = Fake(film)
    if point == "fetch":
        fake.acts = {clips.clips[victim].video: [Killed()]}
    else:
        die_at(monkeypatch, point, victim)
    with pytest.raises(Killed):
        download(clips, tmp_path, fake, FAST)
    monkeypatch.undo()
    check_goes_on(film, clips, tmp_path, victim)


def die_at(monkeypatch: pytest.MonkeyPatch, point: str, victim: int) -> None:
    module, name = point.rsplit(".", 1)
    owner: Any = Ledger if module.endswith("Ledger") else running
    real: Callable[..., Any] = getattr(owner, name)
    calls = [0]

    def act(*arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        return (kill if calls[0] > victim else real)(*arguments, **named)

    monkeypatch.setattr(owner, name, act)


def check_goes_on(film: Path, clips: Annotations, out: Path, finished: int) -> None:
    """Every file that is there is whole; a new run leaves `finished` clips alone and makes the others."""
    for name in files(out):
        assert len(pictures_of(out / "clips" / name)) == 25
    kept = {name: (out / "clips" / name).stat().st_mtime_ns for name in files(out)[:finished]}
    fake = Fake(film)
    found = states(download(clips, out, fake, FAST))
    assert [state for _, state in sorted(found.items())] == ["there"] * finished + ["got"] * (len(found) - finished)
    assert {name: (out / "clips" / name).stat().st_mtime_ns for name in kept} == kept
    assert not list(out.glob(".scratch-*")) and len(fake.asked) == len(found) - finished


CHILD = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}, {here!r}]
import test_download_run as t
from tools.download import run
film, out, victim = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
real, calls = run.publish, [0]
def publish(*arguments):
    calls[0] += 1
    if calls[0] > victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
run.publish = publish
t.download(t.annotated(*(t.clip(f"c{{k}}") for k in range(3))), out, t.Fake(film), t.FAST)
"""


@pytest.mark.parametrize("victim", [0, 2])
def test_real_kill_leaves_a_folder_that_goes_on(film: Path, tmp_path: Path, victim: int) -> None:
    here = Path(__file__).parent
    code = CHILD.format(root=str(ROOT), tests=str(ROOT / "tests"), here=str(here))
    done = subprocess.run([sys.executable, "-c", code, str(film), str(tmp_path), str(victim)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.glob(".scratch-*")), "a killed process cannot clean up"
    check_goes_on(film, annotated(*(clip(f"c{k}") for k in range(3))), tmp_path, victim)


def test_torn_line_of_the_ledger_is_dropped(film: Path, tmp_path: Path) -> None:
    clips = annotated(clip("c0"), clip("c1"), clip("c2"))
    download(clips, tmp_path, Fake(film), FAST)
    path = tmp_path / "ledger.jsonl"
    data = path.read_bytes()
    for size in range(data.rfind(b"\n", 0, -1) + 1, len(data), 37):
        path.write_bytes(data[:size])
        check_goes_on(film, clips, tmp_path, 2)
        assert len(lines(tmp_path)) == 3


@pytest.mark.parametrize("line", ["x", "[]", "{}", '{"clip": "a", "date": "x", "state": "odd"}',
                                  '{"clip": "a", "date": "x", "state": "gone", "reason": []}', "\x00"])  # fmt: skip
def test_damaged_ledger_is_named(film: Path, tmp_path: Path, line: str) -> None:
    (tmp_path / "ledger.jsonl").write_text(line + "\n")
    with pytest.raises(LedgerError, match=r"ledger\.jsonl:1: expected a JSON object"):
        download(annotated(clip("a")), tmp_path, Fake(film), FAST)


def test_folder_of_another_set_is_refused(film: Path, tmp_path: Path) -> None:
    download(annotated(clip("a")), tmp_path, Fake(film), FAST)
    with pytest.raises(LedgerError, match="source = 'TEST': expected 'OTHER'"):
        download(replace(annotated(clip("a")), source="OTHER"), tmp_path, Fake(film), FAST)


def test_two_runs_in_one_folder(film: Path, tmp_path: Path) -> None:
    class Nested(Fake):
        def fetch(self, request: Request) -> Path:
            with pytest.raises(LedgerError, match="another download is running"):
                download(annotated(clip("b")), tmp_path, Fake(film), FAST)
            return super().fetch(request)

    assert states(download(annotated(clip("a")), tmp_path, Nested(film), FAST)) == {"a": "got"}


def test_full_disk_ends_the_run_and_leaves_no_half_line(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def short(descriptor: int, data: bytes) -> int:
        return real(descriptor, data[:5]) if data.startswith(b'{"clip"') else real(descriptor, data)

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(OSError, match="disk is full"):
        download(annotated(clip("a"), clip("b")), tmp_path, Fake(film), FAST)
    monkeypatch.undo()
    assert (tmp_path / "ledger.jsonl").read_bytes() == b""
    assert states(download(annotated(clip("a"), clip("b")), tmp_path, Fake(film), FAST)) == {"a": "got", "b": "got"}


def test_interrupt_ends_the_run_with_a_report(film: Path, tmp_path: Path) -> None:
    begun = threading.Event()

    class Waiting(Fake):
        def fetch(self, request: Request) -> Path:
            if self.asked:
                begun.wait(20)  # the interrupt comes while the second clip is fetched
            return super().fetch(request)

    def interrupt(done: int, all: int) -> None:
        begun.set()
        raise KeyboardInterrupt

    clips = annotated(*(clip(f"c{k}") for k in range(6)))
    report = download(clips, tmp_path, Waiting(film), FAST, progress=interrupt)
    found = sorted(set(states(report).values()))
    assert report.interrupted and found == ["got", "untried"]
    assert len(files(tmp_path)) == list(states(report).values()).count("got")


def test_table_adds_up(film: Path, tmp_path: Path) -> None:
    clips = annotated(*(clip(name) for name in ("old", "new", "gone1", "gone2", "net", "more")), clip("long", end=9))
    download(annotated(clips.clips[0]), tmp_path, Fake(film), FAST)
    acts: dict[str, list[BaseException]] = {
        clip("gone1").video: [ClipFailure(Reason.PRIVATE, "x")],
        clip("gone2").video: [ClipFailure(Reason.REMOVED, "x")],
        clip("net").video: [ClipFailure(Reason.NETWORK, "x")],
    }
    clips = replace(clips, clips=(*clips.clips[:5], clips.clips[6], clips.clips[5]))
    report = download(clips, tmp_path, Fake(film, acts), replace(FAST, tries=1, limit=5))
    rows = [(words, reason, count, round(hours * 3600)) for words, reason, count, hours in table.rows(report)]
    assert rows == [
        ("got in this run", "", 1, 1),
        ("already there", "", 1, 1),
        ("gone", "private", 1, 0),
        ("gone", "removed", 1, 0),
        ("failed, next run tries again", "length", 1, 0),
        ("failed, next run tries again", "network", 1, 0),
        ("not tried", "", 1, 0),
    ]
    assert sum(count for _, _, count, _ in rows) == len(clips.clips)
    table.write(report, tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    assert sum(row["clips"] for row in content["table"]) == 7
    identities = json.loads((tmp_path / "identities.json").read_text())
    there = {name for name, outcome in report.outcomes.items() if outcome.state in ("got", "there")}
    assert identities == {name: f"youtube-{clip(name).video}" for name in there} and len(there) == 2
    assert {entry["clip"]: entry["reason"] for entry in content["missing"]} == {
        "gone1": "private", "gone2": "removed", "net": "network", "long": "length", "more": None,
    }  # fmt: skip
