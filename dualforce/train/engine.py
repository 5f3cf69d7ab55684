"""From a run to a DeepSpeed engine."""

from __future__ import annotations

import importlib
import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dualforce.config import ConfigError, RunConfig
from dualforce.config_file import read_json
from dualforce.model.embedding import Embedding, Heads
from dualforce.model.layer import DualLayer
from dualforce.model.placement import Place
from dualforce.train.gather_unit import FLAT, GatherUnit, is_matrix
from dualforce.train.graphed import GraphPool
from dualforce.train.recompute import Recompute
from dualforce.train.zero3 import fill_sizes, lean_step
from megatron_ext.kernels.apex import fused_adam
from megatron_ext.parallel.grid import ProcessGrid

logger = logging.getLogger(__name__)

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
SECTIONS = ("fp16", "bf16", "data_types", "zero_optimization", "optimizer", "scheduler")


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
    if config.get("data_types", {}).get("grad_accum_dtype") == "auto":
        # Gradients come in the model's dtype: a single one needs no more to be kept exactly.
        config["data_types"]["grad_accum_dtype"] = "bf16" if plan.accumulation == 1 and _bf16(config) else "fp32"
    if stage == 1 and _bf16(config) and config.get("data_types", {}).get("grad_accum_dtype") == "fp32":
        raise ConfigError(
            f"{path}: zero_optimization.stage = 1 with bf16.enabled and data_types.grad_accum_dtype = fp32 (auto: with "
            "several micro-batches): expected stage 2 or 3, or bf16 sums: DeepSpeed 0.19.8 cannot export what it writes"
        )
    schedule = config.get("scheduler", {}).get("params", {})
    if schedule.get("total_num_steps") == "auto":
        schedule["total_num_steps"] = run.train.steps
    return config


def compute_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """bf16 when the DeepSpeed configuration enables it, else fp32."""
    return torch.bfloat16 if _bf16(config) else torch.float32


def _bf16(config: Mapping[str, Any]) -> bool:
    return bool(config.get("bf16", {}).get("enabled"))


def build_engine(
    build: Callable[[Place], nn.Module],
    config: dict[str, Any],
    grid: ProcessGrid,
    recompute: Recompute = "none",
    graphs: bool = False,
) -> Any:
    """Construct the module in gather units, each partitioned as soon as it is there under ZeRO-3 (so that no rank ever
    holds the whole model), and wrap it in a DeepSpeed engine."""
    deepspeed = importlib.import_module("deepspeed")
    dtype, stage = compute_dtype(config), config.get("zero_optimization", {}).get("stage", 0)

    layers = itertools.count()
    pool = GraphPool() if graphs and grid.device.type == "cuda" else None

    def place(make: Callable[[], nn.Module]) -> nn.Module:
        with torch.device(grid.device):
            module = make().to(dtype)
        # Embeddings and heads are small: what is computed again are layers.
        keep = not isinstance(module, DualLayer) or (recompute == "selective" and next(layers) % 2 == 1)
        capture = pool if isinstance(module, (Embedding, DualLayer, Heads)) else None
        unit = GatherUnit(module, "none" if keep else recompute, partitioned=stage == 3, graphs=capture)
        if stage == 3:
            deepspeed.zero.Init(module=unit, config_dict_or_path=config, dtype=dtype)
        return unit

    module = build(place)
    groups = parameter_groups(module)
    optimizer = apex_adam(groups, config) if grid.device.type == "cuda" else None
    if optimizer is not None:
        config = {key: value for key, value in config.items() if key != "optimizer"}
    if stage == 3:
        units: list[Any] = [unit for unit in module.modules() if isinstance(unit, GatherUnit)]
        config = fill_sizes(config, [sum(flat.ds_numel for flat in unit.parameters()) for unit in units])
    engine = deepspeed.initialize(model=module, model_parameters=groups, optimizer=optimizer, config=config)[0]
    if stage == 3:
        lean_step(engine)
    return engine


def close_engine(engine: Any) -> None:
    """Let go of the engine, its CUDA graphs first: NCCL waits for those that hold its exchanges before it leaves a
    process group, for ever."""
    for unit in engine.module.modules():
        if isinstance(unit, GatherUnit):
            unit.drop_graphs()
    engine.destroy()


def apex_adam(groups: list[dict[str, Any]], config: Mapping[str, Any]) -> Any:
    """NVIDIA apex's FusedAdam for the configured AdamW; None where apex is not installed, another optimizer is wanted,
    or its states are in host memory, where apex has none."""
    made, section = fused_adam(), config["optimizer"]
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    if made is None or section.get("type") != "AdamW" or offload != "none":
        return None
    logger.info("optimizer: NVIDIA apex's FusedAdam for AdamW")
    known = {key: value for key, value in section.get("params", {}).items() if key not in ("torch_adam", "fused")}
    return made(groups, adam_w_mode=True, **known)


def optimizer_name(engine: Any) -> str:
    """Class of the optimizer that holds the moments: those of one class mean nothing to another."""
    kind = type(engine.basic_optimizer)
    return f"{kind.__module__}.{kind.__qualname__}"


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Matrices with the configured weight decay; biases, norms, modulation rows without; each in one."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        flat = name.rpartition(".")[2]
        matrix = flat == "matrices" if flat in FLAT else is_matrix(name, tuple(parameter.shape))
        (decayed if matrix else plain).append(parameter)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
