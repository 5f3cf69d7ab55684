"""`dualforce data build`: what it prints, its exit codes, bad input as one line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_shards.check import find_faults
from data_shards.reader import ShardSet
from dualforce import cli

ROOT = Path(__file__).resolve().parents[1]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call `dualforce data build ARGS`; returns the exit code and what it wrote to stdout and stderr."""

    def call(*args: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dualforce", "data", "build", *map(str, args)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        written = capsys.readouterr()
        return int(left.value.code or 0), written.out, written.err

    return call


def take(sample_dir: Path, folder: Path, count: int) -> Path:
    folder.mkdir()
    for path in sorted(sample_dir.glob("*.mp4"))[:count]:
        for suffix in (".mp4", ".json"):
            shutil.copy(path.with_suffix(suffix), folder)
    return folder


def test_build_and_build_again(sample_dir: Path, tmp_path: Path, run: Run) -> None:
    src, out = take(sample_dir, tmp_path / "src", 2), tmp_path / "out"
    (src / "[red]broken.mp4").write_bytes(b"x")
    shutil.copy(src / "id00.json", src / "[red]broken.json")
    arguments = (src, "--out", out, "--size", 64, "--workers", 1, "--source", "rendered here", "--licence", "mine")
    code, text, errors = run(*arguments)
    assert code == 0, errors
    assert "[red]broken.mp4" in errors and "E_DECODE" in errors
    lines = text.splitlines()
    assert lines[0] == f"{out}: 1 identities and 1 clips in train, 1 identities and 1 clips in validation"
    assert lines[1].startswith("2 of 3 videos used; ") and lines[1].endswith(f"; see {out / 'report.html'}")
    shards = ShardSet.open(out)
    meta = shards.split("train").read(0).meta
    assert shards.manifest["pixel_size"] == 64 and meta["origin"] == "rendered here" and meta["licence"] == "CC0-1.0"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert find_faults(out, samples=True).faults == []
    code, text, _ = run(*arguments)
    assert code == 0 and "2 of 3 videos used, 3 finished by an earlier start" in text
    code, _, errors = run(*arguments[:-1], "theirs")
    assert code == 2 and errors.startswith(f"error: {out}/manifest.json: a shard set exists here, of other videos")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such folder: expected a folder of videos"),
        (["."], "no video file"),
        ([".", "--size", "100"], "--size 100: expected a multiple of 16"),
        ([".", "--workers", "0"], "--workers 0: expected at least 1"),
        ([".", "--devices", "gpu"], "--devices 'gpu': expected cpu, or cuda:0"),
        ([".", "--devices", ","], "--devices: none: expected"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text, errors = run(*arguments, "--out", "out")
    assert code == 2 and text == ""
    assert len(errors.splitlines()) == 1 and errors.startswith("error: ") and message in errors


def test_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    code, _, errors = run(tmp_path, "--out", tmp_path / "out", "--devices", "cuda:0,cuda:1")
    assert (
        code == 2
        and errors == "error: --devices cuda:0: no such device: expected cpu, as no CUDA GPU is available here\n"
    )
    assert not (tmp_path / "out").exists()


def test_files_of_people_that_cannot_be_used(sample_dir: Path, tmp_path: Path, run: Run) -> None:
    src = take(sample_dir, tmp_path / "src", 1)
    cases = ((3, "3: expected a name of the person"), ("x" * 501, "501 characters: expected at most 500"))
    for value, message in cases:
        (tmp_path / "who.json").write_text(json.dumps({"id00": value}))
        code, _, errors = run(src, "--out", tmp_path / "out", "--identities", tmp_path / "who.json")
        assert code == 2 and len(errors.splitlines()) == 1 and f"'id00': {message}" in errors


@pytest.mark.parametrize("option", ["--limits", "--identities", "--captions"])
@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file: expected a JSON object"), ("[1]", "expected a JSON object, found list")],
)
def test_a_file_that_cannot_be_read_is_told_with_its_option(
    sample_dir: Path, tmp_path: Path, run: Run, option: str, content: str | None, message: str
) -> None:
    src, path = take(sample_dir, tmp_path / "src", 1), tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    more = ("--text-encoder", tmp_path) if option == "--captions" else ()
    code, text, errors = run(src, "--out", tmp_path / "out", option, path, *more)
    assert (code, text, errors) == (2, "", f"error: {option} {path}: {message}\n")


@pytest.mark.parametrize("option", ["--out", "--work"])
@pytest.mark.parametrize(
    ("folder", "reason"),
    [("file/x", "Not a directory"), ("link", "File exists"), ("x" * 300, "File name too long"),
     ("/proc/none/x", "No such file or directory")],
)  # fmt: skip
def test_a_folder_that_cannot_be_made_is_told_with_its_option(
    sample_dir: Path, tmp_path: Path, run: Run, option: str, folder: str, reason: str
) -> None:
    src, given = take(sample_dir, tmp_path / "src", 1), tmp_path / folder
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    folders = {"--out": tmp_path / "out", option: given}
    code, text, errors = run(src, *(part for pair in folders.items() for part in pair))
    assert (code, text) == (2, "")
    assert errors == f"error: {option} {given}: {reason}: expected a folder that can be made and written to\n"


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_stopped_command_goes_on(sample_dir: Path, tmp_path: Path, how: signal.Signals) -> None:
    """The whole command with its real workers: Ctrl-C is one line, SIGKILL none; no process is left, and the next
    start does what is left."""
    src, out = take(sample_dir, tmp_path / "src", 20), tmp_path / "out"  # some seconds of work after the first
    command = [sys.executable, "-m", "dualforce", "data", "build", str(src), "--out", str(out), "--size", "128"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # Tests may run in the background, where shells have Ctrl-C ignored, and a process hands that on.
    asked = signal.signal(signal.SIGINT, signal.default_int_handler)
    first = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    signal.signal(signal.SIGINT, asked)
    results = out / ".work" / "results"
    end = time.monotonic() + 120
    while not (results.is_dir() and any(results.iterdir())):
        assert time.monotonic() < end and first.poll() is None
        time.sleep(0.01)
    os.killpg(first.pid, how)
    _, errors = first.communicate()
    if how == signal.SIGINT:
        assert first.returncode == 130
        assert errors == "error: interrupted; the same command goes on with the videos that are left\n"
    while alive(first.pid):
        assert time.monotonic() < end
        time.sleep(0.02)
    done = len(list(results.iterdir()))
    assert done >= 1 and not (out / "manifest.json").exists()
    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stderr
    facts = json.loads((out / "report.json").read_text())
    assert facts["videos_used"] == 20 and facts["videos_done_earlier"] == done
    assert f"{done} of 20 videos were finished by an earlier start" in second.stderr


def alive(session: int) -> list[str]:
    """Processes of a session that are no zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(path.parent.name)
    return found
