"""Kill -9 at random points: no finished video is worked on again, and the shards are those of an undisturbed build."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.set_files import set_bytes

from data_shards.check import find_faults

ROOT = Path(__file__).resolve().parents[2]


def prepare(folder: Path, sample_dir: Path, clips: int) -> dict[str, str]:
    """Some of the bundled clips and a broken one; the paths of a case."""
    (folder / "src").mkdir()
    for path in sorted(sample_dir.glob("*.mp4"))[:clips]:
        for suffix in (".mp4", ".json"):
            shutil.copy(path.with_suffix(suffix), folder / "src")
    (folder / "src" / "broken.mp4").write_bytes(b"no video")
    shutil.copy(folder / "src" / "id00.json", folder / "src" / "broken.json")
    return {name: str(folder / name) for name in ("src", "out", "undisturbed", "log")}


def killed_builds(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """What helpers.killed_builds prints."""
    (folder / "case.json").write_text(json.dumps({**case, "workers": 2}))
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "helpers.killed_builds", str(folder / "case.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize(
    ("clips", "kills"), [pytest.param(4, 4, id="few"), pytest.param(20, 20, id="many", marks=pytest.mark.slow)]
)
def test_killed_builds_end_as_if_nothing_had_happened(tmp_path: Path, sample_dir: Path, clips: int, kills: int) -> None:
    told = killed_builds(tmp_path, {**prepare(tmp_path, sample_dir, clips), "kills": kills, "seed": clips})
    log = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    print(json.dumps(told, indent=1), len(log), "videos worked on")
    assert len(told["kills"]) == kills
    expected = set_bytes(tmp_path / "undisturbed")
    for out in (tmp_path / "out" / str(number) for number in range(1, told["sets"] + 1)):
        assert set_bytes(out) == expected
        assert not (out / ".work").exists() and (out / "report.html").is_file()
        # Every video was worked on, none once its result was kept, and a kill costs no more than what was in hand.
        mine = [entry for entry in log if entry["set"] == out.name]
        assert len({entry["sha256"] for entry in mine}) == clips + 1
        assert not any(entry["redone"] for entry in mine)
        killed = sum(kill["set"] == int(out.name) for kill in told["kills"])
        assert clips + 1 <= len(mine) <= clips + 1 + 2 * killed
    assert find_faults(tmp_path / "out" / "1", samples=True).faults == []


@pytest.mark.slow
def test_killed_at_every_step_of_the_end(tmp_path: Path, sample_dir: Path) -> None:
    """From the last video to the removal of the work folder, before each step towards the disk or after it."""
    told = killed_builds(tmp_path, {**prepare(tmp_path, sample_dir, 2), "base": str(tmp_path / "base")})
    print(told)
    assert told["steps"] >= 20 and told["complete"] == sorted(told["complete"]) and any(told["complete"])
    names = sorted(path.name for path in (tmp_path / "undisturbed").iterdir())
    for number in range(1, told["steps"] + 1):
        assert set_bytes(tmp_path / "out" / str(number)) == set_bytes(tmp_path / "undisturbed"), number
        assert sorted(path.name for path in (tmp_path / "out" / str(number)).iterdir()) == names, number
