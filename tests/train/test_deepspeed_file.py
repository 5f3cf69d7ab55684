"""DeepSpeed files: those of the project pass, and what DeepSpeed would ignore or choke on is one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from dualforce.config import ConfigError
from dualforce.config_file import read_json
from dualforce.train.deepspeed_file import check_deepspeed_file

ROOT = Path(__file__).resolve().parents[2] / "ds_configs"
FILES = sorted([*ROOT.glob("*.json"), *(ROOT / "fp32").glob("*.json")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_projects_own_files_pass(path: Path) -> None:
    check_deepspeed_file(path, read_json(path))


# A dotted key, its new value, what has to be said of it.
BAD: list[tuple[str, Any, str]] = [
    ("gradient_cliping", 1.0, "unknown key gradient_cliping = 1.0; did you mean gradient_clipping?"),
    ("gradient_clipping", "auto", 'gradient_clipping = "auto": Input should be a valid number'),
    ("gradient_clipping", -1.0, "gradient_clipping = -1.0: Input should be greater than or equal to 0"),
    ("prescale_gradients", True, "unknown key prescale_gradients = true"),
    ("checkpoint", {"writer": {}}, 'unknown key checkpoint = {"writer": {}}'),
    ("amp", {"enabled": True}, 'unknown key amp = {"enabled": true}'),
    ("bf16.enabled", "yes", 'bf16.enabled = "yes": Input should be a valid boolean'),
    ("data_types.grad_accum_dtype", "fp99", 'data_types.grad_accum_dtype = "fp99"'),
    ("zero_optimization.overlap_com", True, "zero_optimization: unknown key overlap_com = true; did you mean overlap"),
    ("zero_optimization.overlap_comm", "perhaps", 'zero_optimization: overlap_comm = "perhaps"'),
    ("zero_optimization.offload_optimizer", {"device": "tape"}, 'zero_optimization: offload_optimizer.device = "tape"'),
    ("optimizer.type", "AdamX", 'optimizer.type = "AdamX": expected AdamW, or another that DeepSpeed knows'),
    ("optimizer.params.weigth_decay", 0.1, "unknown key optimizer.params.weigth_decay = 0.1; did you mean optimizer"),
    ("optimizer.params.lr", -1e-4, "optimizer.params.lr = -0.0001: expected a number, 0 or more"),
    ("optimizer.params.lr", "auto", "optimizer.params.lr = 'auto': expected a number, 0 or more"),
    ("optimizer", {"params": {}}, "key optimizer.type is missing"),
    ("scheduler.type", "Warmup", 'scheduler.type = "Warmup": expected one of LRRangeTest, OneCycle, WarmupLR'),
    ("scheduler.params.warmup_steps", 3, "unknown key scheduler.params.warmup_steps = 3; did you mean sched"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "message"), BAD, ids=[key for key, _, _ in BAD])
def test_what_cannot_be_used_is_one_line(tmp_path: Path, key: str, value: Any, message: str) -> None:
    config = copy.deepcopy(read_json(ROOT / "zero3.json"))
    section, (*parents, last) = config, key.split(".")
    for name in parents:
        section = section.setdefault(name, {})
    section[last] = value
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError) as error:
        check_deepspeed_file(path, read_json(path))
    assert message in str(error.value) and str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer", {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}),
        ("optimizer", {"type": "Lion", "params": {"lr": 0.1}}),
        ("scheduler", {"type": "StepLR", "params": {"step_size": 2}}),
        ("scheduler", None),
        ("aio", {"block_size": 1048576}),
        ("wall_clock_breakdown", True),
    ],
)
def test_what_deepspeed_can_use_passes(key: str, value: Any) -> None:
    check_deepspeed_file(ROOT / "zero3.json", read_json(ROOT / "zero3.json") | {key: value})
