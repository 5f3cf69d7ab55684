"""The parts of a checkpoint that the project writes itself; whole runs are in tests/invariants/test_runs.py."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import numpy
import pytest
import torch

from dualforce.config import ConfigError
from dualforce.train import checkpoint
from dualforce.train.checkpoint import SavedState, read_state
from dualforce.train.gather_unit import Slot

STATE = SavedState(
    step=5,
    world=2,
    sequence=2,
    zero_stage=3,
    run={"train": {"steps": 9, "seed": 1, "log_every": 1}},
    engine={"gradient_clipping": 1.0, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2},
    units={"model.head": {"matrices": [Slot("weight", (2, 3), 0)], "vectors": [Slot("bias", (2,), 0)]}},
    optimizer="torch.optim.adamw.AdamW",
    shards="0" * 64,
)


def write_checkpoint(run: Path, state: SavedState) -> Path:
    folder = run / "checkpoints" / f"step-{state.step:06d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps(asdict(state)))
    (run / "checkpoints" / "LATEST").write_text(folder.name + "\n")
    return folder


def test_state_is_read_back(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, STATE)
    assert read_state(tmp_path) == STATE
    assert read_state(tmp_path, 5) == STATE


def test_damaged_clips_are_read_back_and_none_where_they_were_not_kept(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, replace(STATE, damaged=((0, "a"), (1, "a"))))
    assert read_state(tmp_path).damaged == ((0, "a"), (1, "a"))
    values = asdict(STATE)
    del values["damaged"]
    (folder / "state.json").write_text(json.dumps(values))
    assert read_state(tmp_path) == STATE and STATE.damaged == ()
    (folder / "state.json").write_text(json.dumps({**values, "damaged": ["abc"]}))
    with pytest.raises(ConfigError, match=r"state\.json: "):
        read_state(tmp_path)


def test_missing_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="LATEST: no such file"):
        read_state(tmp_path)
    folder = write_checkpoint(tmp_path, STATE)
    with pytest.raises(ConfigError, match=r"step-000004.*no such file"):
        read_state(tmp_path, 4)
    (folder / "state.json").write_text('{"step": 5}')
    with pytest.raises(ConfigError, match=r"state\.json"):
        read_state(tmp_path)
    older = {key: value for key, value in asdict(STATE).items() if key != "shards"}
    (folder / "state.json").write_text(json.dumps(older))
    with pytest.raises(ConfigError, match=r"state\.json: key shards is missing: expected a checkpoint of this version"):
        read_state(tmp_path)


@pytest.mark.parametrize("key", ["log_every", "save_every", "stop_at"])
def test_intervals_may_change_on_resume(key: str) -> None:
    other = replace(STATE, run={"train": {**STATE.run["train"], key: 77}})
    checkpoint._check_same(STATE, other, Path("run"))


@pytest.mark.parametrize("key", ["prefetch", "workers", "allow_new_shards", "shards"])
def test_how_clips_are_read_may_change_on_resume(key: str) -> None:
    old, new = (replace(STATE, run={**STATE.run, "data": {key: value}}) for value in (0, 1))
    checkpoint._check_same(old, new, Path("run"))


def test_other_values_may_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.seed = 1, this run 2"):
        checkpoint._check_same(STATE, replace(STATE, run={"train": {**STATE.run["train"], "seed": 2}}), tmp_path)
    with pytest.raises(ConfigError, match=r"deepspeed\.gradient_clipping = 1\.0, this run 2\.0"):
        checkpoint._check_same(STATE, replace(STATE, engine={**STATE.engine, "gradient_clipping": 2.0}), tmp_path)
    with pytest.raises(ConfigError, match=r"has optimizer = torch.optim.adamw.AdamW, this run apex.FusedAdam"):
        checkpoint._check_same(STATE, replace(STATE, optimizer="apex.FusedAdam"), tmp_path)
    moved = {"model.head": {"matrices": [Slot("weight", (3, 2), 0)], "vectors": [Slot("bias", (2,), 0)]}}
    with pytest.raises(ConfigError, match=r"has other parameters in model\.head"):
        checkpoint._check_same(STATE, replace(STATE, units=moved), tmp_path)


ELSEWHERE = replace(STATE, world=4, sequence=1, engine={**STATE.engine, "gradient_accumulation_steps": 1})


@pytest.mark.parametrize("key", ["max_micro_batch", "clips_per_step"])
def test_how_a_step_is_dealt_may_change_but_not_its_clips(key: str) -> None:
    old, new = (replace(s, run={**s.run, "data": {key: i}}) for i, s in enumerate((STATE, ELSEWHERE)))
    if key == "clips_per_step":
        with pytest.raises(ConfigError, match=r"has data\.clips_per_step = 0, this run 1"):
            checkpoint._check_same(old, new, Path("run"))
    else:
        checkpoint._check_same(old, new, Path("run"))


@pytest.mark.parametrize(
    ("key", "value", "free"),
    [
        ("train_batch_size", 4, "shape"),
        ("data_types", {"grad_accum_dtype": "fp32"}, "shape"),
        ("zero_optimization", {"stage": 2, "overlap_comm": True}, "partition"),
        ("optimizer", {"params": {"fused": True}}, "partition"),
        ("optimizer", {"params": {"lr": 1.0}}, "never"),
        ("gradient_clipping", 2.0, "never"),
        ("bf16", {"enabled": True}, "never"),
    ],
)
def test_what_follows_from_the_ranks_is_free_only_with_them(key: str, value: object, free: str) -> None:
    """`shape`: with other micro-batches too; `partition`: only where DeepSpeed's files are others."""
    dealt = replace(STATE, sequence=1, engine=ELSEWHERE.engine)
    for other, allowed in ((STATE, ()), (dealt, ("shape",)), (ELSEWHERE, ("shape", "partition"))):
        changed = replace(other, engine={**other.engine, key: value})
        if free in allowed:
            checkpoint._check_same(STATE, changed, Path("run"))
        else:
            with pytest.raises(ConfigError, match=rf"step 5 has deepspeed\.{key}"):
                checkpoint._check_same(STATE, changed, Path("run"))


def test_generators_continue_where_they_were() -> None:
    def draws() -> tuple[list[float], list[float], list[float]]:
        return torch.rand(5).tolist(), [random.random() for _ in range(5)], numpy.random.rand(5).tolist()

    device = torch.device("cpu")
    draws()
    states = {name: tensor.clone() for name, tensor in checkpoint._generator_states(device).items()}
    expected = draws()
    assert draws() != expected
    checkpoint._restore_generators(states, device)
    assert draws() == expected
