"""A checkpoint that is not as it was written: named in one line on all ranks before anything is loaded."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.fake_shards import write_fake_shards
from helpers.launches import Launch, Outcome, launch_all

from dualforce.config import ConfigError
from dualforce.train.checkpoint import read_fp32_state, read_state
from dualforce.train.manifest import check_share, read_manifest

pytestmark = pytest.mark.timeout(1200)

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "ds_configs" / "runs" / "tiny.json"
NARROW, TELLING = "invariants.run_cases:narrow", "invariants.damage_cases:telling"
WORLD, TAG = 2, "step-000002"
OPTIMIZER = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


def middle(path: Path) -> int:
    return path.stat().st_size * 4


# What is done to the checkpoint of a run (and of another run like it): the line that has to come.
DAMAGE: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "flip": (lambda one, other: flip(one / OPTIMIZER, middle(one / OPTIMIZER)), rf"{OPTIMIZER}: xxh3 \w+: expected"),
    "flip-rng": (lambda one, other: flip(one / "rng-00001.safetensors", 999), r"rng-00001\.safetensors: xxh3"),
    "gone": (lambda one, other: (one / OPTIMIZER).unlink(), rf"{OPTIMIZER}: no such file; expected the files of every"),
    "foreign": (lambda one, other: shutil.copy(other / OPTIMIZER, one), rf"{OPTIMIZER}: xxh3"),
    "state": (lambda one, other: flip(one / "state.json", 333), r"state\.json: xxh3"),
    "torn": (lambda one, other: (one / "manifest.json").unlink(), r"manifest\.json: no such file; expected a complete"),
    "pointer": (lambda one, other: flip(one.parent / "LATEST", 3), r"LATEST: b'\{tep-000002\\n': expected the name of"),
}  # fmt: skip


class Runs:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = write_fake_shards(folder / "shards", clips=6, frames=5)
        self.outcomes: dict[str, Outcome] = {}

    def launch(self, name: str, more: list[str], world: int = WORLD, target: str = NARROW) -> Launch:
        values = [f"data.shards={self.shards}", "data.frames=5", "data.clips_per_step=2", "train.steps=4",
                  "train.log_every=1", "train.validation_sigmas=1",
                  f"deepspeed={ROOT / 'ds_configs' / 'fp32' / 'zero3.json'}"]  # fmt: skip
        sets = [item for value in values for item in ("--set", value)]
        return Launch(name, world, ["--run", str(TINY), "--out", str(self.folder / name), *sets, *more], target)

    def checkpoint(self, name: str) -> Path:
        return self.folder / name / "checkpoints" / TAG

    def copy(self, name: str) -> Path:
        shutil.copytree(self.folder / "whole", self.folder / name)
        return self.checkpoint(name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Two steps of a run and of another one, and every way to go on from what was damaged."""
    runs = Runs(tmp_path_factory.mktemp("damage"))
    stop = ["--set", "train.stop_at=2"]
    runs.outcomes = launch_all([runs.launch("whole", stop), runs.launch("other", [*stop, "--seed", "5"])])
    for name in ("whole", "other"):
        assert runs.outcomes[name].ok, runs.outcomes[name].show()
    launches = []
    for name, (damage, _) in DAMAGE.items():
        for world in (WORLD, 1):
            damage(runs.copy(f"{name}-{world}"), runs.checkpoint("other"))
            launches.append(runs.launch(f"{name}-{world}", ["--resume"], world, TELLING))
    runs.copy("sound")
    launches.append(runs.launch("sound", ["--resume"], WORLD, TELLING))
    # A kill while four ranks wrote step 4: what there is of it must not be taken for the two ranks' own.
    torn = runs.copy("torn-before").with_name("step-000004")
    torn.mkdir()
    (torn / "zero_pp_rank_3_mp_rank_00_optim_states.pt").write_bytes(b"torn")
    launches.append(runs.launch("torn-before", ["--resume"]))
    (runs.copy("no-statistics").parents[1] / "config.json").write_text('{"run": ')  # a kill while it was written
    launches.append(runs.launch("no-statistics", ["--resume"]))
    runs.copy("full")
    launches.append(runs.launch("full", ["--resume"], WORLD, "invariants.damage_cases:full_disk"))
    runs.outcomes |= launch_all(launches)
    return runs


def check_one_line(outcome: Outcome, message: str) -> None:
    assert set(outcome.codes) == {2}, outcome.show()
    errors = [line for text in outcome.outputs for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(message, errors[0]), outcome.show()
    assert "Traceback" not in "".join(outcome.outputs)


@pytest.mark.parametrize("world", [WORLD, 1])
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line_before_anything_is_loaded(runs: Runs, name: str, world: int) -> None:
    """With the ranks that wrote it (DeepSpeed loads) and with another number of them (the project does)."""
    outcome = runs.outcomes[f"{name}-{world}"]
    check_one_line(outcome, DAMAGE[name][1])
    assert "LOADED" not in "".join(outcome.outputs)
    assert "LOADED" in "".join(runs.outcomes["sound"].outputs)


@pytest.mark.parametrize("name", DAMAGE)
def test_nothing_damaged_is_exported(runs: Runs, name: str) -> None:
    with pytest.raises(ConfigError, match=DAMAGE[name][1]):
        read_fp32_state(runs.folder / f"{name}-{WORLD}")


def test_what_a_killed_save_left_is_put_aside(runs: Runs) -> None:
    """Resumed and saved at the same step; the result is that of a run without such a past."""
    for name in ("sound", "torn-before", "no-statistics"):
        assert runs.outcomes[name].ok, runs.outcomes[name].show()
    folder = runs.folder / "torn-before" / "checkpoints"
    assert {path.name for path in folder.glob("step-*")} == {TAG, "step-000004", "step-000004.torn-1"}
    assert "kept as step-000004.torn-1" in runs.outcomes["torn-before"].outputs[0]
    expected, found = (read_fp32_state(runs.folder / name, 4) for name in ("sound", "torn-before"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_statistics_come_from_the_checkpoint(runs: Runs) -> None:
    """OUT/config.json is for people: spoilt, it changes nothing, and is written anew."""
    assert runs.outcomes["no-statistics"].ok, runs.outcomes["no-statistics"].show()
    written = [json.loads((runs.folder / name / "config.json").read_text()) for name in ("sound", "no-statistics")]
    assert written[0] == written[1] and written[0]["statistics"]


def test_a_disk_that_is_full_for_one_rank_ends_all_with_the_checkpoint_before(runs: Runs) -> None:
    outcome, folder = runs.outcomes["full"], runs.folder / "full" / "checkpoints"
    check_one_line(outcome, r"step-000004/zero_pp_rank_1_.*\.pt: cannot be written: No space left on device")
    assert read_state(runs.folder / "full").step == 2
    assert not (folder / "step-000004").exists()


def test_two_hundred_damages_of_all_kinds_are_all_named(runs: Runs, tmp_path: Path) -> None:
    """Random bits flipped, files cut, lengthened, deleted, swapped with each other and with another run's."""
    source, other, run = runs.checkpoint("whole"), runs.checkpoint("other"), tmp_path / "run"
    folder = run / "checkpoints" / TAG
    shutil.copytree(source, folder)
    shutil.copy(source.parent / "LATEST", folder.parent)
    names, chance = sorted(path.name for path in source.iterdir()), random.Random(0)
    assert found_by_ranks(run) == []
    for number in range(200):
        name = chance.choice(names)
        path, second = folder / name, folder / chance.choice([one for one in names if one != name])
        kind = chance.choice(["flip", "flip", "cut", "longer", "gone", "swap", "foreign"])
        content = {"swap": second, "foreign": other / name}.get(kind)
        if content is not None and content.read_bytes() == path.read_bytes():
            kind = "flip"  # these two are alike
        if kind == "flip":
            flip(path, chance.randrange(8 * path.stat().st_size))
        elif kind == "cut":
            path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])
        elif kind == "longer":
            path.write_bytes(path.read_bytes() + b"\0")
        elif kind == "gone":
            path.unlink()
        elif kind == "swap":
            first = path.read_bytes()
            shutil.copy(second, path)
            second.write_bytes(first)
        else:
            shutil.copy(other / name, path)
        errors = found_by_ranks(run)
        assert errors, (number, kind, name)
        told = (name, second.name) if kind == "swap" else ("",) if name == "manifest.json" else (name,)
        for error in errors:
            assert "\n" not in error and any(f"{folder}/{one}" in error for one in told), (number, kind, name, error)
        for spoilt in (path, second):
            shutil.copy(source / spoilt.name, spoilt)
    assert found_by_ranks(run) == []


def found_by_ranks(run: Path) -> list[str]:
    """What the ranks say before they agree."""
    errors = []
    for rank in range(WORLD):
        try:
            saved = read_state(run)
            folder = run / "checkpoints" / f"step-{saved.step:06d}"
            check_share(folder, read_manifest(folder), rank, WORLD)
        except ConfigError as error:
            errors.append(str(error))
    return errors
