"""Run files parse and name a DeepSpeed file that is there; an ablation changes what its name says and no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dualforce.config_file import load_run
from dualforce.presets import PRESETS

RUNS = Path(__file__).resolve().parent.parent / "ds_configs" / "runs"
ABLATIONS = {
    "no_structure": {"model.bridge_directions": "none"},
    "one_way_bridge": {"model.bridge_directions": "s2v"},
    "fusion_depth_4": {"model.bridge_layers": 4},
    "fusion_depth_12": {"model.bridge_layers": 12},
    "sigma_s_cap_0.5": {"noise.max_sigma_struct": 0.5},
    "sigma_s_cap_1.0": {"noise.max_sigma_struct": 1.0, "noise.p_above_max_struct": 0.0},
    "long_sequence": {"data.frames": 21, "data.max_micro_batch": 1, "parallel.sequence": 2},
}


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def resolved(path: Path) -> dict[str, Any]:
    """All keys of a run, with defaults, paths without `..`."""
    values = flat(load_run(path).model_dump())
    for key in ("deepspeed", "data.shards"):
        values[key] = str(Path(values[key]).resolve())
    return values


def test_each_preset_has_a_run_file() -> None:
    assert {path.stem for path in RUNS.glob("*.json")} == set(PRESETS)


@pytest.mark.parametrize("path", sorted(RUNS.rglob("*.json")), ids=lambda path: path.stem)
def test_run_file_parses_and_its_deepspeed_file_exists(path: Path) -> None:
    run = load_run(path)
    assert Path(run.deepspeed).is_file()
    preset = PRESETS[run.preset]
    assert (run.data.frames - 1) % preset.frames_per_chunk == 0
    assert preset.video[1] % run.parallel.sequence == preset.struct[1] % run.parallel.sequence == 0


def test_all_seven_ablations_are_there() -> None:
    assert {path.stem for path in (RUNS / "ablations").glob("*.json")} == set(ABLATIONS)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablation_changes_what_it_says_and_nothing_else(name: str) -> None:
    base, changed = resolved(RUNS / "mova-lite.json"), resolved(RUNS / "ablations" / f"{name}.json")
    different = {key: changed[key] for key in changed if changed[key] != base[key]}
    assert different == ABLATIONS[name]


def test_run_files_do_not_repeat_defaults_of_deepspeed() -> None:
    """Optimizer, schedule, clipping and precision live in the DeepSpeed file only."""
    for path in RUNS.rglob("*.json"):
        keys = set(flat(json.loads(path.read_text())))
        assert not [key for key in keys if any(word in key for word in ("lr", "optimizer", "clip_grad", "bf16"))], path
