"""The three commands: from annotation files to clips, and one line for what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from helpers.numbered_clip import numbered_clip
from typer.testing import CliRunner, Result

from tools import download_celebvhq, download_hdtf, download_vfhq
from tools.download import command
from tools.download.command import parse_rate
from tools.download.reasons import ClipFailure, Reason
from tools.download.run import OptionError
from tools.download.ytdlp import Request, YtDlp

ID, DEAD = "-aaaaaaaaa_", "_dddddddddd"
TOOLS = [download_hdtf, download_celebvhq, download_vfhq]


def run(tool: ModuleType, *arguments: object) -> Result:
    return CliRunner().invoke(tool.app, [str(argument) for argument in arguments])


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[YtDlp]:
    """A downloader that needs no network; returns the list of those that were made."""
    film = numbered_clip(tmp_path / "film.mp4", 200)
    made: list[YtDlp] = []

    def fetch(self: YtDlp, request: Request) -> Path:
        made.append(self)
        if request.video == DEAD:
            raise ClipFailure(Reason.REMOVED, "ERROR: Video unavailable")
        return Path(shutil.copy(film, request.folder / "source.mp4"))

    monkeypatch.setattr(YtDlp, "fetch", fetch)
    monkeypatch.setattr(YtDlp, "check", lambda self: None)
    return made


def hdtf_files(folder: Path) -> Path:
    for prefix in ("RD", "WDA", "WRA"):
        (folder / f"{prefix}_video_url.txt").write_text(f"A https://youtu.be/{ID}\nB https://youtu.be/{DEAD}\n")
        (folder / f"{prefix}_annotion_time.txt").write_text("B.mp4 0:00-0:03\nA.mp4 0:00-0:02 0:05-0:09 x-y")
        (folder / f"{prefix}_crop_wh.txt").write_text("A_0.mp4 200 640 150 480\nA_1.mp4 0 720 0 720\nB_0.mp4 0 9 0 9\n")
        (folder / f"{prefix}_resolution.txt").write_text("A.mp4 720\nB.mp4 720\n")
    return folder


def celebvhq_files(folder: Path) -> Path:
    box = {"top": 0.2, "bottom": 0.8, "left": 0.3, "right": 0.7}
    clips = {f"{video}_0": {"ytb_id": video, "duration": {"start_sec": 2.5, "end_sec": 6.0}, "bbox": box}
             for video in (ID, DEAD)}  # fmt: skip
    (folder / "celebvhq_info.json").write_text(json.dumps({"meta_info": {}, "clips": clips | {"../x": {}}}))
    return folder / "celebvhq_info.json"


def vfhq_files(folder: Path) -> Path:
    for video, frames in ((ID, "10-120"), (DEAD, "10-120"), (ID, "200-210")):
        (folder / f"Clip+{video}+P0+C1+F{frames}.txt").write_text("H 720\nW 960\nFPS 25\nCROP 200 150 840 630\n")
    return folder


@pytest.mark.parametrize(
    ("tool", "make", "clips", "height"),
    [
        (download_hdtf, hdtf_files, [f"{p}_A_{k}.mp4" for p in ("RD", "WDA", "WRA") for k in (0, 1)], 96),
        (download_celebvhq, celebvhq_files, [f"{ID}_0.mp4"], 84),
        (download_vfhq, vfhq_files, [f"Clip+{ID}+P0+C1+F10-120.mp4"], 96),
    ],
)
def test_from_annotations_to_clips(
    tmp_path: Path, fake: list[YtDlp], tool: ModuleType, make: object, clips: list[str], height: int
) -> None:
    (tmp_path / "in").mkdir()
    annotations, out = make(tmp_path / "in"), tmp_path / "out"  # type: ignore[operator]
    result = run(tool, annotations, out, "--whole", "--rate", "1M", "--workers", 2, "--sleep", 0)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (out / "clips").iterdir()) == clips
    report = json.loads((out / "report.json").read_text())
    assert report["missing"] and {entry["reason"] for entry in report["missing"]} == {"removed"}
    assert report["problems"] and sum(row["clips"] for row in report["table"]) == len(clips) + len(report["missing"])
    assert all(text in result.output for text in ("got in this run", "removed", "annotated", "expected"))
    first = json.loads((out / "ledger.jsonl").read_text().splitlines()[0])
    assert first["state"] == "gone" or first["height"] == height
    assert {one.rate for one in fake} == {512 * 1024}, "the rate is shared by the workers"
    asked = len(fake)
    again = run(tool, annotations, out)
    assert again.exit_code == 0 and "already there" in again.output and len(fake) == asked


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["."], "expected"),
        ([".", "--workers", "0"], "--workers 0: expected at least 1"),
        ([".", "--limit", "-1"], "--limit -1: expected at least 0"),
        ([".", "--tries", "0"], "--tries 0: expected at least 1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: ModuleType, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(tool, *arguments[:1], "out", *arguments[1:])
    lines = result.output.strip().splitlines()
    assert result.exit_code == 2 and len(lines) == 1
    assert lines[0].startswith("error: ") and message in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("--rate", "fast", "--rate 'fast'"), ("--rate", "0", "--rate '0'"), ("--sleep", "-1", "--sleep -1"),
     ("--sleep", "nan", "--sleep nan"), ("--cookies", "none", "none: no such file")],
)  # fmt: skip
def test_bad_option_of_the_downloader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, value: str, message: str
) -> None:
    monkeypatch.setattr("tools.download.ytdlp.importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("tools.download.ytdlp.shutil.which", lambda name: "/bin/x")
    result = run(download_vfhq, vfhq_files(tmp_path), tmp_path / "out", option, value)
    assert result.exit_code == 2 and message in result.output and len(result.output.strip().splitlines()) == 1


def test_missing_program_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.download.ytdlp.importlib.util.find_spec", lambda name: None)
    result = run(download_vfhq, vfhq_files(tmp_path), tmp_path / "out")
    assert result.exit_code == 2 and "pip install 'dualforce[download]'" in result.output


def test_interrupted_run_says_so_to_the_shell(
    tmp_path: Path, fake: list[YtDlp], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = command.download

    def interrupted(*arguments: object, **named: object) -> object:
        report = real(*arguments, **named)  # type: ignore[arg-type]
        report.interrupted = True
        return report

    monkeypatch.setattr(command, "download", interrupted)
    assert run(download_vfhq, vfhq_files(tmp_path), tmp_path / "out").exit_code == 130


def test_a_rate_that_would_not_hold_is_refused(tmp_path: Path, fake: list[YtDlp]) -> None:
    """Sections are read by ffmpeg, which nothing slows down."""
    result = run(download_vfhq, vfhq_files(tmp_path), tmp_path / "out", "--rate", "1M")
    assert result.exit_code == 2 and "--rate 1M: binds whole videos alone: expected --whole too" in result.output
    assert not fake and not (tmp_path / "out").exists()


def test_rates() -> None:
    assert [parse_rate(text) for text in ("1", "500K", "4M", "1.5m", "2G")] == [1, 512_000, 4 << 20, 3 << 19, 2 << 30]
    for text in ("", "0", "-1", "1T", "nan", "1e3", "0.0001"):
        with pytest.raises(OptionError):
            parse_rate(text)
