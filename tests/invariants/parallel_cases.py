"""Ranks of test_parallel.py: train the same clips under every layout and compare with plain torch in one process.

Not a test module: `helpers.launches` calls `main` in every rank. Rank 0 writes what was measured as JSON.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from helpers.units import pack_state
from torch import Tensor, nn

from data_shards.reader import ShardSet
from dualforce import launch
from dualforce.config import ModelOverrides, RunConfig, validate
from dualforce.data.loader import StepLoader
from dualforce.data.statistics import StreamStatistics
from dualforce.data.steps import Deal
from dualforce.model.path import ChunkRule
from dualforce.model.placement import Place, in_place
from dualforce.presets import PRESETS, Preset, build_model_config
from dualforce.train.engine import build_engine, parameter_groups, plan_batch
from dualforce.train.gather_unit import layouts_of, unpack_state
from dualforce.train.step import StepContext, prepare_step, train_step
from dualforce.train.train_module import StepInput, StepOutput, TrainModule
from megatron_ext.kernels.kernel_set import select_kernels
from megatron_ext.parallel.grid import ProcessGrid

STEPS = 5
RECOMPUTE = ("full", "none", "selective", "offload")  # by ZeRO stage, where a clip is split
LEARNING_RATE, CLIP = 1e-3, 0.5
KERNELS = select_kernels("reference", torch.device("cpu"), torch.float32)
# Narrow, but with every part: two layers, bridge both ways, audio, text, and heads that four ranks divide.
PRESETS["tiny"] = Preset((32, 4, 48, 2), (16, 4, 24, 2), 2, (1, None, 24, 4), 8, 2)


class Measured:
    """Losses of each step, gradients of the last, weights after it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.gradients: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}


class PlainEngine:
    """One process of plain torch with the interface that a step needs: the reference."""

    def __init__(self, module: nn.Module, accumulation: int) -> None:
        self.module, self._accumulation, self._seen = module, accumulation, 0
        groups = parameter_groups(module)
        self._optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
        self.norm = 0.0

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        assert not scale_wrt_gas
        loss.backward()
        self._seen += 1

    def is_gradient_accumulation_boundary(self) -> bool:
        return self._seen % self._accumulation == 0

    def step(self) -> None:
        if self.is_gradient_accumulation_boundary():
            self.norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), CLIP))
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=False)

    def get_global_grad_norm(self) -> float:
        return self.norm

    def zero_optimization(self) -> bool:
        return True  # the norm above is kept, as under ZeRO

    def bfloat16_enabled(self) -> bool:
        return False


def run_config(shards: str, sequence: int, recompute: str) -> RunConfig:
    """Eight clips a step, one a micro-batch, so that every layout accumulates; 7 frames divide by neither 2 nor 4."""
    values = {
        "preset": "tiny",
        "deepspeed": "unused",
        "data": {"shards": shards, "frames": 7, "clips_per_step": 8, "max_micro_batch": 1},
        "loss": {"flame_steps": 20},
        "parallel": {"sequence": sequence, "recompute": recompute},
        "train": {"steps": STEPS, "seed": 3},
    }
    return validate(RunConfig, values, "test")


def engine_config(stage: int, accumulation: int, world: int) -> dict[str, Any]:
    """fp32, no schedule; nothing persists, so that ZeRO-3 partitions every tensor."""
    adamw = {"lr": LEARNING_RATE, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "torch_adam": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": accumulation * world,
        "gradient_clipping": CLIP,
        "steps_per_print": None,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": adamw},
    }


def module_for(
    run: RunConfig, shards: ShardSet, start: dict[str, Tensor] | None, place: Place = in_place
) -> TrainModule:
    """The model with random values everywhere (zero-initialised leaves would hide errors), or the values `start`."""
    extractors = shards.manifest["extractors"]
    config = build_model_config(
        "tiny",
        struct_dim=extractors["motion"]["width"],
        audio_dim=extractors["audio"]["width"],
        overrides=ModelOverrides(),
    )
    torch.manual_seed(0)
    module = TrainModule(config, run.loss, KERNELS, extractors["flame"]["width"], place)
    flat = start and pack_state(start, layouts_of(module))
    source = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            if flat is not None:
                parameter.data.copy_(flat[name])
            else:
                noise = torch.randn(parameter.shape, generator=source) * 0.2
                parameter.data.add_(noise) if not name.endswith("log_tau") else None
    return module


def train(engine: Any, run: RunConfig, shards: ShardSet, grid: ProcessGrid) -> Measured:
    plan = plan_batch(run.data.clips_per_step, grid.dp, run.data.max_micro_batch)
    config = (engine.module if hasattr(engine, "module") else engine).model.config
    context = StepContext(run, grid, KERNELS, ChunkRule(config.frames_per_chunk, config.window, config.sink))
    deal = Deal(
        StreamStatistics.from_manifest(shards.manifest), run.data, context=config.audio.context,
        text_dim=config.video.text_dim, seed=run.train.seed, dp_rank=grid.dp_rank, dp_size=grid.dp,
        micro_batch=plan.micro_batch,
    )  # fmt: skip
    loader = StepLoader([shards], deal, 0, STEPS, partial(prepare_step, context=context))
    measured = Measured()
    for step, prepared in enumerate(loader):
        shares = torch.zeros(1, dtype=torch.float64)

        def record(_: StepInput, output: StepOutput, shares: Tensor = shares, step: int = step) -> None:
            shares += output.terms.total.detach().double() / grid.world
            if step == STEPS - 1 and engine.is_gradient_accumulation_boundary():
                for name, parameter in engine.module.named_parameters():
                    measured.gradients[name] = deepspeed.utils.safe_get_full_grad(parameter).clone()

        norm = train_step(engine, prepared, context, step, record)
        if grid.world > 1:
            dist.all_reduce(shares)
        measured.losses.append(shares.item())
        measured.norms.append(float(norm))
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            measured.weights[name] = parameter.detach().clone()
    layouts = layouts_of(engine.module)
    if layouts:
        measured.gradients = unpack_state(measured.gradients, layouts)
        measured.weights = unpack_state(measured.weights, layouts)
    return measured


def compare(found: Measured, reference: Measured, norm: float) -> dict[str, Any]:
    """Largest relative differences of losses and norms; smallest cosines of gradients and weights, with the tensor."""
    worst: dict[str, Any] = {"gradient": (1.0, ""), "weight": (1.0, ""), "compared": 0}
    for name, gradient in reference.gradients.items():
        if gradient.norm() <= 1e-6 * norm:
            continue
        worst["compared"] += 1
        pairs = {
            "gradient": (found.gradients[name], gradient),
            "weight": (found.weights[name], reference.weights[name]),
        }
        for kind, (a, b) in pairs.items():
            worst[kind] = min(worst[kind], (cosine(a, b), name))
    worst["loss"] = max(abs(a - b) / abs(b) for a, b in zip(found.losses, reference.losses, strict=True))
    worst["norm"] = max(abs(a - b) / abs(b) for a, b in zip(found.norms, reference.norms, strict=True))
    worst["scale"] = max(
        abs(float(found.gradients[name].norm() / gradient.norm()) - 1)
        for name, gradient in reference.gradients.items()
        if gradient.norm() > 1e-3 * norm
    )
    return worst


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double().flatten(), b.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


def main() -> None:
    shards, out = ShardSet.open(Path(sys.argv[1])), Path(sys.argv[2])
    launch.start(1, seed=0)
    rank = dist.get_rank()
    run = run_config(sys.argv[1], 1, "none")
    module = module_for(run, shards, None)
    start = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    reference = train(PlainEngine(module, 8), run, shards, ProcessGrid.single())
    norm = float(torch.stack([g.norm() for g in reference.gradients.values()]).norm())
    rows = {"reference": {"losses": reference.losses, "norms": reference.norms, "norm": norm}}
    for sequence in (1, 2, 4):
        grid = ProcessGrid.build(sequence, torch.device("cpu"))
        for stage in (0, 1, 2, 3):
            run = run_config(sys.argv[1], sequence, RECOMPUTE[stage] if sequence > 1 else "none")
            plan = plan_batch(8, grid.dp, 1)
            config = engine_config(stage, plan.accumulation, grid.world)
            engine = build_engine(
                lambda place, run=run: module_for(run, shards, start, place), config, grid, run.parallel.recompute
            )
            rows[f"sp{sequence}-zero{stage}"] = compare(train(engine, run, shards, grid), reference, norm)
            engine.destroy()
    if rank == 0:
        out.write_text(json.dumps(rows))
