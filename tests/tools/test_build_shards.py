"""The command line of the shard builder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tools.build_shards import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_build_and_report(sample_dir: Path, tmp_path: Path) -> None:
    for path in sorted(sample_dir.glob("id0[0-1].*")):
        shutil.copy(path, tmp_path / path.name)
    (tmp_path / "broken.mp4").write_bytes(b"x")
    shutil.copy(tmp_path / "id00.json", tmp_path / "broken.json")
    result = run(tmp_path, "--out", tmp_path / "out", "--size", 64, "--workers", 1)
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["pixel_size"] == 64
    assert "E_DECODE" in result.output and "broken.mp4" in result.output and "2 of 3 videos used" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "expected a folder of videos"),
        (["."], "no video file"),
        ([".", "--size", "100"], "--size 100: expected a multiple of 16"),
        ([".", "--workers", "0"], "--workers 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, "--out", "out")
    assert result.exit_code == 2
    lines = result.output.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
