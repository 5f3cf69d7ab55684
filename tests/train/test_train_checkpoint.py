"""The parts of a checkpoint that the project writes itself; whole runs are in tests/invariants/test_runs.py."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import numpy
import pytest
import torch
from helpers.checkpoint_folder import seal, write_checkpoint

from dualforce.config import ConfigError
from dualforce.train import checkpoint
from dualforce.train.checkpoint import SavedState, read_state
from dualforce.train.gather_unit import Slot
from dualforce.train.generators import generator_states, restore_generators

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
    config={"statistics": {"video": {"mean": [0.5]}}},
)


def test_state_is_read_back(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, STATE)
    assert read_state(tmp_path) == STATE
    assert read_state(tmp_path, 5) == STATE


def test_damaged_clips_are_read_back(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, replace(STATE, damaged=((0, "a"), (1, "a"))))
    assert read_state(tmp_path).damaged == ((0, "a"), (1, "a"))
    values = asdict(STATE)
    del values["damaged"]
    (folder / "state.json").write_text(json.dumps(values))
    seal(folder)
    with pytest.raises(ConfigError, match=r"state\.json: key damaged is missing"):
        read_state(tmp_path)
    (folder / "state.json").write_text(json.dumps({**values, "damaged": ["abc"]}))
    seal(folder)
    with pytest.raises(ConfigError, match=r"state\.json: "):
        read_state(tmp_path)


def test_missing_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="LATEST: no such file"):
        read_state(tmp_path)
    folder = write_checkpoint(tmp_path, STATE)
    with pytest.raises(
        ConfigError, match=r"step-000004.manifest\.json: no such file; expected a complete checkpoint of this version"
    ):
        read_state(tmp_path, 4)
    (folder / "state.json").write_text('{"step": 5}')
    seal(folder)
    with pytest.raises(ConfigError, match=r"state\.json"):
        read_state(tmp_path)


@pytest.mark.parametrize("key", ["units", "shards", "config"])
def test_the_state_of_an_earlier_version_is_refused_by_what_it_lacks(tmp_path: Path, key: str) -> None:
    folder = write_checkpoint(tmp_path, STATE)
    older = {name: value for name, value in asdict(STATE).items() if name != key}
    (folder / "state.json").write_text(json.dumps(older))
    seal(folder)
    with pytest.raises(ConfigError, match=rf"state\.json: key {key} is missing: expected a checkpoint of this version"):
        read_state(tmp_path)


def test_a_state_that_is_not_as_written_is_refused(tmp_path: Path) -> None:
    """Well formed, with another seed."""
    path = write_checkpoint(tmp_path, STATE) / "state.json"
    path.write_text(path.read_text().replace('"seed": 1', '"seed": 2'))
    with pytest.raises(ConfigError, match=r"state\.json: xxh3 .* as written \(damaged data\)"):
        read_state(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"step-5\n", b"step-000005\n\n", b"step-000005 step-000006\n", b"\xff"]
)
def test_a_pointer_that_names_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    write_checkpoint(tmp_path, STATE)
    pointer = tmp_path / "checkpoints" / "LATEST"
    pointer.write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"LATEST: .*: expected the name of a checkpoint, such as step-000500"
    ) as error:
        read_state(tmp_path)
    assert "\n" not in str(error.value)
    pointer.write_bytes(b"step-000005")  # as an editor leaves it
    assert read_state(tmp_path) == STATE


def test_a_checkpoint_under_another_name_is_refused(tmp_path: Path) -> None:
    """The step is the data position: a folder that was renamed or copied would repeat clips or leave some out."""
    folder = write_checkpoint(tmp_path, STATE)
    folder.rename(folder.with_name("step-000007"))
    with pytest.raises(ConfigError, match=r"step-000007/state\.json: step = 5: expected 7, as its folder is named"):
        read_state(tmp_path, 7)
    (folder.with_name("step-000007") / "state.json").unlink()
    seal(folder.with_name("step-000007"))
    with pytest.raises(
        ConfigError, match=r"step-000007: no state\.json in its manifest: expected a checkpoint of this"
    ):
        read_state(tmp_path, 7)


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
    states = {name: tensor.clone() for name, tensor in generator_states(device).items()}
    expected = draws()
    assert draws() != expected
    restore_generators(states, device)
    assert draws() == expected
