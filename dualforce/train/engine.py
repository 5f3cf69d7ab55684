"""From a run to a DeepSpeed engine."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dualforce.config import ConfigError, RunConfig, read_json
from megatron_ext.parallel.grid import ProcessGrid

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
SECTIONS = ("fp16", "bf16", "zero_optimization", "optimizer", "scheduler")


@dataclass(frozen=True)
class BatchPlan:
    """How the clips of a step are dealt: `micro_batch` clips per forward, `accumulation` forwards per rank and step."""

    micro_batch: int
    accumulation: int


def plan_batch(clips_per_step: int, dp: int, max_micro_batch: int) -> BatchPlan:
    """The largest micro-batch that divides each data-parallel rank's clips; ConfigError when they do not divide."""
    if clips_per_step % dp:
        raise ConfigError(
            f"data.clips_per_step = {clips_per_step}: expected a multiple of the {dp} data-parallel ranks"
        )
    per_rank = clips_per_step // dp
    micro = max(size for size in range(1, min(per_rank, max_micro_batch) + 1) if per_rank % size == 0)
    return BatchPlan(micro, per_rank // micro)


def deepspeed_config(run: RunConfig, plan: BatchPlan, world: int) -> dict[str, Any]:
    """The DeepSpeed file of the run with its batch keys and the length of its schedule filled in.

    Sequence-parallel ranks count as data-parallel ones for DeepSpeed, which is not told about them (losses/total.py).
    """
    path = Path(run.deepspeed)
    config = read_json(path)
    for key in BATCH_KEYS:
        if config.get(key, "auto") != "auto":
            raise ConfigError(f'{path}: {key} = {config[key]}: expected "auto", the run file sets data.clips_per_step')
    for key in SECTIONS:
        if not isinstance(config.get(key, {}), dict):
            raise ConfigError(f"{path}: {key} = {config[key]!r}: expected an object")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"{path}: zero_optimization.stage = {stage!r}: expected 0, 1, 2 or 3")
    if config.get("fp16", {}).get("enabled"):
        raise ConfigError(f"{path}: fp16.enabled = true: expected bf16 or neither (fp32)")
    if "optimizer" not in config:
        raise ConfigError(f"{path}: key optimizer is missing")
    config["train_micro_batch_size_per_gpu"] = plan.micro_batch
    config["gradient_accumulation_steps"] = plan.accumulation
    config["train_batch_size"] = plan.micro_batch * plan.accumulation * world
    schedule = config.get("scheduler", {}).get("params", {})
    if schedule.get("total_num_steps") == "auto":
        schedule["total_num_steps"] = run.train.steps
    return config


def compute_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """bf16 when the DeepSpeed configuration enables it, else fp32."""
    return torch.bfloat16 if config.get("bf16", {}).get("enabled") else torch.float32


def build_engine(build: Callable[[], nn.Module], config: dict[str, Any], grid: ProcessGrid) -> Any:
    """Construct the module (partitioned from the start under ZeRO-3) and wrap it in a DeepSpeed engine."""
    deepspeed = importlib.import_module("deepspeed")
    stage = config.get("zero_optimization", {}).get("stage", 0)
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=stage == 3, dtype=compute_dtype(config)):
        module = build()
    module = module.to(device=grid.device, dtype=compute_dtype(config)) if stage < 3 else module
    engine, _, _, _ = deepspeed.initialize(model=module, model_parameters=parameter_groups(module), config=config)
    return engine


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Matrices with the configured weight decay; biases, norms, modulation rows without; each in one."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # the shape before ZeRO-3 partitioned it
        matrix = len(shape) >= 2 and not name.endswith("modulation")
        (decayed if matrix else plain).append(parameter)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
