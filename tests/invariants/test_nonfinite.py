"""A gradient that is not finite on one rank: all ranks leave the step out, bit for bit, and go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.fake_shards import write_fake_shards
from helpers.launches import Launch, Outcome, launch_all
from invariants.nonfinite_cases import STEP

from dualforce.train.checkpoint import read_fp32_state

pytestmark = pytest.mark.timeout(1200)

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "ds_configs" / "runs" / "tiny.json"
CASES = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 0), ("bf16", 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nonfinite")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Outcome]:
    shards = write_fake_shards(folder / "shards", clips=6, frames=5)
    launches = []
    for precision, stage in CASES:
        name = f"{precision}-{stage}"
        config = json.loads((ROOT / "ds_configs" / precision.removeprefix("bf16") / f"zero{stage}.json").read_text())
        config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 2}}
        (folder / f"{name}.json").write_text(json.dumps(config))
        values = [f"data.shards={shards}", "data.frames=5", "data.clips_per_step=4", "data.max_micro_batch=1",
                  f"train.steps={STEP + 2}", "train.log_every=1", "train.save_every=1", "train.validation_sigmas=1",
                  f"deepspeed={folder / f'{name}.json'}"]  # fmt: skip
        sets = [item for value in values for item in ("--set", value)]
        arguments = ["--run", str(TINY), "--out", str(folder / name), *sets]
        launches.append(Launch(name, 2, arguments, "invariants.nonfinite_cases:not_a_number"))
    return launch_all(launches)


@pytest.mark.parametrize(("precision", "stage"), CASES)
def test_the_step_is_left_out_on_all_ranks(
    outcomes: dict[str, Outcome], folder: Path, precision: str, stage: int
) -> None:
    outcome, run = outcomes[f"{precision}-{stage}"], folder / f"{precision}-{stage}"
    assert outcome.ok, outcome.show()
    before, spoilt, after = (read_fp32_state(run, step) for step in (STEP - 1, STEP, STEP + 1))
    earlier = read_fp32_state(run, STEP - 2)
    assert any(not torch.equal(earlier[name], before[name]) for name in before)  # the steps around it do move
    assert all(torch.equal(before[name], spoilt[name]) for name in before)
    assert any(not torch.equal(spoilt[name], after[name]) for name in before)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert f"step {STEP}: loss nan" in outcome.outputs[0]
