"""Dealing out clips, filling in the DeepSpeed file, and grouping parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_model import kernels, tiny_config

from dualforce.config import ConfigError, LossConfig, RunConfig, validate
from dualforce.train.engine import BatchPlan, compute_dtype, deepspeed_config, parameter_groups, plan_batch
from dualforce.train.train_module import TrainModule
from dualforce.train.zero3 import fill_sizes


def run_with(path: Path, config: dict[str, Any]) -> RunConfig:
    path.write_text(json.dumps(config))
    return validate(RunConfig, {"preset": "tiny", "deepspeed": str(path), "train": {"steps": 7}}, "test")


@pytest.mark.parametrize(
    ("clips", "dp", "limit", "expected"),
    [(8, 1, 8, (8, 1)), (8, 2, 8, (4, 1)), (8, 2, 3, (2, 2)), (12, 2, 4, (3, 2)), (7, 1, 4, (1, 7)), (4, 4, 8, (1, 1))],
)
def test_plan_takes_the_largest_dividing_micro_batch(
    clips: int, dp: int, limit: int, expected: tuple[int, int]
) -> None:
    plan = plan_batch(clips, dp, limit)
    assert plan == BatchPlan(*expected)
    assert plan.micro_batch * plan.accumulation * dp == clips


def test_plan_refuses_clips_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match="clips_per_step = 6: expected a multiple of the 4"):
        plan_batch(6, 4, 8)


def test_batch_keys_and_schedule_are_filled_in(tmp_path: Path) -> None:
    config = {
        "train_batch_size": "auto",
        "optimizer": {"type": "AdamW", "params": {}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": "auto"}},
    }
    filled = deepspeed_config(run_with(tmp_path / "ds.json", config), BatchPlan(2, 3), 4)
    assert filled["train_micro_batch_size_per_gpu"] == 2
    assert filled["gradient_accumulation_steps"] == 3
    assert filled["train_batch_size"] == 2 * 3 * 4
    assert filled["scheduler"]["params"]["total_num_steps"] == 7


@pytest.mark.parametrize(
    ("accumulation", "bf16", "expected"), [(1, True, "bf16"), (2, True, "fp32"), (1, False, "fp32")]
)
def test_gradients_are_kept_in_as_many_bits_as_their_sum_needs(
    tmp_path: Path, accumulation: int, bf16: bool, expected: str
) -> None:
    config = {"bf16": {"enabled": bf16}, "data_types": {"grad_accum_dtype": "auto"}, "optimizer": {}}
    filled = deepspeed_config(run_with(tmp_path / "ds.json", config), BatchPlan(1, accumulation), 1)
    assert filled["data_types"]["grad_accum_dtype"] == expected
    config["data_types"] = {"grad_accum_dtype": "fp32"}
    asked = deepspeed_config(run_with(tmp_path / "ds.json", config), BatchPlan(1, accumulation), 1)
    assert asked["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize(
    ("dtype", "accumulation", "refused"), [("fp32", 1, True), ("auto", 2, True), ("auto", 1, False)]
)
def test_sums_that_deepspeed_cannot_export_are_refused(
    tmp_path: Path, dtype: str, accumulation: int, refused: bool
) -> None:
    """Stage 1 alone; it is refused before the run, not after weeks."""
    for stage in (0, 1, 2, 3):
        config = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": dtype}, "optimizer": {},
                  "zero_optimization": {"stage": stage}}  # fmt: skip
        run = run_with(tmp_path / "ds.json", config)
        if stage == 1 and refused:
            with pytest.raises(
                ConfigError, match=r"ds\.json: zero_optimization\.stage = 1 with bf16.* expected stage 2"
            ):
                deepspeed_config(run, BatchPlan(1, accumulation), 1)
        else:
            deepspeed_config(run, BatchPlan(1, accumulation), 1)


def test_sizes_follow_from_the_largest_unit_unless_the_file_has_them() -> None:
    section = {"stage": 3, "reduce_bucket_size": 7}
    assert fill_sizes({"a": 1, "zero_optimization": section}, [10, 40, 30]) == {
        "a": 1,
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 40,
            "stage3_max_live_parameters": 80,
            "stage3_max_reuse_distance": 40,
            "reduce_bucket_size": 7,
        },
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"train_batch_size": 8, "optimizer": {}}, 'train_batch_size = 8: expected "auto"'),
        ({"fp16": {"enabled": True}, "optimizer": {}}, "fp16.enabled = true"),
        ({}, "key optimizer is missing"),
        ({"zero_optimization": 3, "optimizer": {}}, "zero_optimization = 3: expected an object"),
        ({"zero_optimization": {"stage": 4}, "optimizer": {}}, "zero_optimization.stage = 4: expected 0, 1, 2 or 3"),
    ],
)
def test_deepspeed_file_that_contradicts_the_run_is_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        deepspeed_config(run_with(tmp_path / "ds.json", config), BatchPlan(1, 1), 1)
    assert str(tmp_path / "ds.json") in str(error.value)


def test_dtype_follows_the_deepspeed_file() -> None:
    assert compute_dtype({"bf16": {"enabled": True}}) is torch.bfloat16
    assert compute_dtype({"bf16": {"enabled": False}}) is torch.float32
    assert compute_dtype({}) is torch.float32


def test_every_parameter_is_in_exactly_one_group() -> None:
    """Norms, biases, modulation rows and the temperature are not decayed; the loss heads are there too (T20)."""
    module = TrainModule(tiny_config(), LossConfig(), kernels(), flame_dim=3)
    decayed, plain = parameter_groups(module)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = [names[id(parameter)] for group in (decayed, plain) for parameter in group["params"]]
    assert sorted(found) == sorted(names.values())
    assert plain["weight_decay"] == 0.0
    assert {"heads.flame.weight", "heads.lip_sync.mouth.0.weight"} <= {names[id(p)] for p in decayed["params"]}
    undecayed = {names[id(p)] for p in plain["params"]}
    assert {"heads.lip_sync.log_tau", "model.layers.0.video.modulation", "model.ends.video.modulation"} <= undecayed
    assert not any(name.endswith("qkv.weight") for name in undecayed)


def test_heads_exist_only_where_their_loss_does() -> None:
    none = TrainModule(tiny_config(), LossConfig(flame=0, lip_sync=0), kernels(), flame_dim=3)
    assert not list(none.heads)
    no_flame = TrainModule(tiny_config(), LossConfig(), kernels(), flame_dim=None)
    assert list(no_flame.heads) == ["lip_sync"]
