"""Hostile shard sets run no code, open nothing outside their folder, stay small and quick; one line refuses them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.hostile_sets import CASES, HARMLESS
from helpers.shard_attacks import good_set

from data_shards.reader import ShardSet

MOST_BYTES, MOST_SECONDS = 256 * 2**20, 2.0
REPOSITORY = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures memory through /proc")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one child process met in the sets, by name."""
    folder = tmp_path_factory.mktemp("hostile")
    for name in ("good", "warm", *CASES):
        good_set(folder / name)
    for name, change in {**CASES, "warm": CASES["record-nan"]}.items():
        change(folder / name)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])}
    command = [sys.executable, "-m", "helpers.hostile_child", str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(found) == len(CASES), done.stderr
    assert not list(folder.rglob("CANARY")), "code from a shard was run"
    ShardSet.open(folder / "good").verify()
    slowest, largest = max(found, key=lambda x: x["work"]), max(found, key=lambda x: x["bytes"])
    print(f"\n{len(found)} sets; slowest {slowest['name']} {slowest['work']:.3f} s; "
          f"largest {largest['name']} {largest['bytes'] / 2**20:.0f} MiB")  # fmt: skip
    return {outcome["name"]: outcome for outcome in found}


def test_there_are_enough() -> None:
    assert len(CASES) - len(HARMLESS) >= 60


@pytest.mark.parametrize("name", CASES)
def test_hostile_set(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    outcome = outcomes[name]
    assert outcome["kind"] == ("read" if name in HARMLESS else "ShardError"), outcome
    assert outcome["forbidden"] == []
    assert outcome["bytes"] <= MOST_BYTES and outcome["work"] <= MOST_SECONDS, outcome
    assert outcome["seconds"] <= 10 * MOST_SECONDS, outcome
    if name not in HARMLESS:
        message = outcome["message"]
        assert message.isprintable() and len(message) <= 1200 and "expected" in message, message
        assert name in message, "the file is named by its path, which holds the name of the case"
