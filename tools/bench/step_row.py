"""One row of the step benchmark: a recipe, built, timed and profiled."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from data_shards.reader import ShardSet
from dualforce import launch
from dualforce.config import ModelConfig, RunConfig
from dualforce.model.flops import forward_flops
from dualforce.model.path import ChunkRule
from dualforce.train.engine import close_engine, deepspeed_config, plan_batch
from dualforce.train.gather_unit import GatherUnit
from dualforce.train.step import StepContext, train_step
from megatron_ext.parallel.grid import ProcessGrid
from tools.bench import recipes
from tools.bench.clips import ClipSize, Source, shard_source, synthetic_source
from tools.bench.rates import DATASHEET_TFLOPS
from tools.bench.trace import busy_ms, traced, write_tables

ROOT = Path(__file__).resolve().parents[2]
CHECKED = 3  # first steps whose losses and gradient norms every row must share
WARM_UP = 4  # steps before the clock starts: graphs are captured in the third


class Subject(NamedTuple):
    """What is trained, on what."""

    model: ModelConfig
    sizes: tuple[ClipSize, ...]  # by turns
    text_tokens: int
    shards: ShardSet | None


def measure(
    name: str, options: argparse.Namespace, subject: Subject, run: RunConfig, grid: ProcessGrid, matmul: float
) -> dict[str, Any]:
    """One row; a recipe that runs out of memory is a row that says so."""
    launch.seed_everything(0)
    torch.cuda.reset_peak_memory_stats()
    model = subject.model
    kernels = recipes.kernels_of(name, grid.device, model)
    context = StepContext(run, grid, kernels, ChunkRule(model.frames_per_chunk, model.window, model.sink))
    config = deepspeed_config(run, plan_batch(run.data.clips_per_step, grid.dp, 1), grid.world)
    if name == "ours-zero1":
        config = _stage1(run, grid)
    if subject.shards is None:
        source = synthetic_source(model, context, sizes=subject.sizes, text_tokens=subject.text_tokens)
    else:
        source = shard_source(subject.shards, model, context, WARM_UP + options.steps + 2)
    try:
        engine = recipes.build(name, model, kernels, config, grid, options.recompute)
        with recipes.backend(name):
            row = _timed(engine, source, context, options, name, len(subject.sizes))
        close_engine(engine)
    except torch.OutOfMemoryError as error:
        told = str(error).split(". ")
        return {"row": name, "ms": None, "note": "; ".join(["out of memory", *told[1:2], *told[3:6]])}
    per_gpu = mean(_flops(subject, size) for size in subject.sizes) / grid.sp / 1e12
    rate = per_gpu / (row["ms"] / 1000)
    row |= {"TFLOP/s a GPU": rate, "of matmul": rate / matmul, f"of {DATASHEET_TFLOPS:.0f}": rate / DATASHEET_TFLOPS}
    return row


def _flops(subject: Subject, size: ClipSize) -> float:
    """Model FLOPs of training on a clip."""
    tokens = size.height * size.width // subject.model.video.patch**2
    return forward_flops(subject.model, size.frames, tokens, subject.text_tokens).training


def _timed(
    engine: Any, source: Source, context: StepContext, options: argparse.Namespace, name: str, sizes: int
) -> dict[str, Any]:
    """Mean seconds of at least `options.steps` steps, as many of each of `sizes` sizes, after a warm-up, the host's
    part of them, and peak memory."""
    losses = torch.zeros(CHECKED, device=context.grid.device)
    norms: list[float] = []
    count = 0

    def record(_: Any, output: Any) -> None:
        if count < CHECKED:
            losses[count] += output.terms.total.detach()

    def step() -> None:
        nonlocal count
        norm = train_step(engine, next(source.steps), context, count, record)
        if count < CHECKED:
            norms.append(float(norm))
        count += 1

    for _ in range(WARM_UP * sizes):
        step()
    torch.cuda.synchronize()
    began, waited = time.perf_counter(), source.waited()
    steps = -(-options.steps // sizes) * sizes
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / steps
    waited = (source.waited() - waited) / steps
    profiler, spans = traced(step, with_host=options.profile is not None)
    if options.profile and context.grid.rank == 0:
        write_tables(options.profile, profiler, spans)
    gathered = _gathered_gb(engine.module, step)
    if context.grid.world > 1:
        dist.all_reduce(losses)
    free, total = torch.cuda.mem_get_info()
    return {
        "row": name,
        "ms": 1000 * seconds,
        "GPU busy ms": busy_ms(spans),
        "wait ms": 1000 * waited,
        "peak GB": torch.cuda.max_memory_allocated() / 1e9,
        "card GB": (total - free) / 1e9,
        "gathered GB": gathered,
        "losses": (losses / context.grid.world).tolist(),
        "norms": norms,
    }


def _gathered_gb(module: nn.Module, step: Callable[[], None]) -> float | None:
    """The most bytes of parameters that are whole on this rank, or on their way to be, when a unit begins, over one
    more step; None for a module without gather units."""
    units = [unit for unit in module.modules() if isinstance(unit, GatherUnit)]
    most = 0

    def look(unit: GatherUnit) -> tuple[torch.Tensor, ...]:
        nonlocal most
        flats = [parameter for one in units for parameter in one.parameters()]
        most = max(most, sum(_whole_bytes(flat) for flat in flats))
        return tuple(getattr(unit, flat) for flat in unit.layout)

    with mock.patch.object(GatherUnit, "_flats", look):
        step()
    return most / 1e9 if units else None


def _whole_bytes(flat: Any) -> int:
    """Bytes that a parameter takes unpartitioned, if it is so or being gathered (outside ZeRO-3 it always is)."""
    status = getattr(flat, "ds_status", None)
    if status is None:
        return int(flat.numel() * flat.element_size())
    return 0 if status.name == "NOT_AVAILABLE" else int(flat.ds_numel * flat.element_size())


def _stage1(run: RunConfig, grid: ProcessGrid) -> dict[str, Any]:
    changed = run.model_copy(update={"deepspeed": str(ROOT / "ds_configs" / "zero1.json")})
    return deepspeed_config(changed, plan_batch(run.data.clips_per_step, grid.dp, 1), grid.world)
