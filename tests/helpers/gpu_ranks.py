"""A module run as one process a GPU, as the launcher would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dualforce import launch

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(module: str, arguments: list[str], world: int, seconds: float) -> list[int]:
    """Exit codes of `python -m module arguments` as ranks 0 to `world` - 1; those that take longer are killed."""
    shared = os.environ | {
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(launch.free_port()),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    command = [sys.executable, "-m", module, *arguments]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world)
    ]
    try:
        return [rank.wait(seconds) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
