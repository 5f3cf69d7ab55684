"""Time whole training steps of a preset, the project's way and as one would train without it.

    deepspeed --num_gpus 4 --module tools.bench_step --sequence 4 --frames 20 --rows ours,fsdp2
    python -m tools.bench_step --frames 20

One clip a data-parallel rank. TFLOP/s count three forwards of unmasked model FLOPs, without recomputation. A row is
printed only if losses and gradient norms of its first steps agree with those of the first row: weights, noise and clips
are the same.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from data_shards.reader import ShardSet
from dualforce import launch
from dualforce.config import ConfigError, ModelConfig, ModelOverrides, RunConfig, validate
from dualforce.model.flops import forward_flops
from dualforce.model.path import ChunkRule
from dualforce.presets import build_model_config
from dualforce.train.engine import deepspeed_config, plan_batch
from dualforce.train.gather_unit import GatherUnit
from dualforce.train.setup import model_config
from dualforce.train.step import StepContext, train_step
from megatron_ext.parallel.grid import ProcessGrid, check_heads
from tools.bench import recipes
from tools.bench.clips import Source, shard_source, synthetic_source
from tools.bench.rates import DATASHEET_TFLOPS, matmul_tflops
from tools.bench.table import show, write_json

ROOT = Path(__file__).resolve().parent.parent
CHECKED = 3  # first steps whose losses and gradient norms every row must share
# bf16 carries 8 bits: two ways to compute one model differ by some 2^-8 in a prediction, far less in a mean over
# millions of them; a norm adds up the errors of gradients that pass through every layer. A dropped mask moves both.
BOUNDS = {"losses": 0.01, "norms": 0.05}
WARM_UP = 4  # steps before the clock starts: graphs are captured in the third


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="tools.bench_step", description=__doc__.split("\n")[0])
    made.add_argument("--preset", default="mova-lite")
    made.add_argument("--frames", type=int, default=20, help="latent frames of a clip")
    made.add_argument("--latent", default="64x64", help="latent height x width; 2x2 makes the arithmetic trivial")
    made.add_argument("--text", type=int, default=512, help="text tokens")
    made.add_argument("--shards", type=Path, help="read this shard set (its latent size and text) with the real loader")
    made.add_argument("--sequence", type=int, default=1, help="ranks that share a clip")
    made.add_argument("--rows", default="ours", help=f"comma-separated, of {', '.join(recipes.NAMES)}")
    made.add_argument("--recompute", default="none", choices=("none", "selective", "full", "offload"))
    made.add_argument("--steps", type=int, default=8)
    made.add_argument("--deepspeed", type=Path, default=ROOT / "ds_configs" / "zero3.json")
    made.add_argument("--json", type=Path, help="file for the rows")
    made.add_argument("--profile", type=Path, help="file for a table of the costliest kernels of the first row")
    made.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Measure the rows; rank 0 prints. Exit code 2 and one line for a wrong input."""
    options = parser().parse_args()
    names = options.rows.split(",")
    try:
        wrong = [name for name in names if name not in recipes.NAMES]
        if wrong:
            raise ConfigError(f"--rows {options.rows}: {wrong[0]}: expected some of {', '.join(recipes.NAMES)}")
        subject = _subject(options)
        heads = {"video.heads": subject.model.video.heads, "struct.heads": subject.model.struct.heads}
        check_heads(options.sequence, heads)
        if not torch.cuda.is_available():
            raise ConfigError("tools.bench_step: no CUDA device: expected an NVIDIA GPU")
        grid = launch.start(options.sequence, seed=0)
        run = _run(options, grid.dp)
    except ValueError as error:
        if launch.is_main():
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    matmul = _slowest(matmul_tflops(), grid)
    rows: list[dict[str, Any]] = []
    for name in names:
        row = _measure(name, options, subject, run, grid, matmul)
        for kind, bound in BOUNDS.items():
            if rows and kind in row and not _agree(row[kind], rows[0][kind], bound):
                raise SystemExit(f"{name}: {kind} {row[kind]} are not those of {names[0]}, {rows[0][kind]}")
        rows.append(row)
        if grid.rank == 0:
            print(show(_title(options, grid, matmul), [{k: v for k, v in r.items() if k not in BOUNDS} for r in rows]))
            sys.stdout.flush()
    if grid.rank == 0 and options.json:
        machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "gpus": grid.world}
        content = {"machine": machine, "matmul_tflops": matmul, "options": _plain(options), "rows": rows}
        write_json(options.json, content)
    launch.finish()


class Subject(NamedTuple):
    """What is trained, on what."""

    model: ModelConfig
    latent: tuple[int, int]
    text_tokens: int
    shards: ShardSet | None


def _subject(options: argparse.Namespace) -> Subject:
    if options.shards is None:
        changes = ModelOverrides(frames_per_chunk=1)
        model = build_model_config(options.preset, struct_dim=70, audio_dim=1024, overrides=changes)
        return Subject(model, _size(options.latent), options.text, None)
    shards = ShardSet.open(options.shards)
    video, text = (shards.manifest["extractors"].get(name) for name in ("video", "text"))
    if text is not None:
        raise ConfigError(f"--shards {options.shards}: has text of any length: expected a set without, to count FLOPs")
    return Subject(model_config(_run(options, 1), shards.manifest), (video["height"], video["width"]), 1, shards)


def _measure(
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
        source = synthetic_source(model, context, latent=subject.latent, text_tokens=subject.text_tokens)
    else:
        source = shard_source(subject.shards, model, context, WARM_UP + options.steps + 2)
    engine = recipes.build(name, model, kernels, config, grid, options.recompute)
    try:
        with recipes.backend(name):
            row = _timed(engine, source, context, options, name)
    except torch.OutOfMemoryError:
        return {"row": name, "ms": None, "note": "out of memory"}
    finally:
        engine.destroy()
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    tokens = subject.latent[0] * subject.latent[1] // model.video.patch**2
    per_gpu = forward_flops(model, options.frames, tokens, subject.text_tokens).training / grid.sp / 1e12
    rate = per_gpu / (row["ms"] / 1000)
    row |= {"TFLOP/s a GPU": rate, "of matmul": rate / matmul, f"of {DATASHEET_TFLOPS:.0f}": rate / DATASHEET_TFLOPS}
    return row


def _timed(
    engine: Any, source: Source, context: StepContext, options: argparse.Namespace, name: str
) -> dict[str, Any]:
    """Seconds of `options.steps` steps after a warm-up, the host's part of them, and peak memory."""
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

    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    began, waited = time.perf_counter(), source.waited()
    for _ in range(options.steps):
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / options.steps
    waited = (source.waited() - waited) / options.steps
    busy = _busy_ms(step, options.profile if name == options.rows.split(",")[0] else None, context.grid)
    gathered = _gathered_gb(engine.module, step)
    if context.grid.world > 1:
        dist.all_reduce(losses)
    free, total = torch.cuda.mem_get_info()
    return {
        "row": name,
        "ms": 1000 * seconds,
        "GPU busy ms": busy,
        "wait ms": 1000 * waited,
        "peak GB": torch.cuda.max_memory_allocated() / 1e9,
        "card GB": (total - free) / 1e9,
        "gathered GB": gathered,
        "losses": (losses / context.grid.world).tolist(),
        "norms": norms,
    }


def _gathered_gb(module: nn.Module, step: Callable[[], None]) -> float | None:
    """The most bytes of parameters that are whole on this rank when a unit begins, over one more step; None for a
    module without gather units."""
    units = [unit for unit in module.modules() if isinstance(unit, GatherUnit)]
    most = 0

    def look(unit: GatherUnit) -> tuple[torch.Tensor, ...]:
        nonlocal most
        flats = [parameter for one in units for parameter in one.parameters()]
        most = max(most, sum(flat.numel() * flat.element_size() for flat in flats))
        return tuple(getattr(unit, flat) for flat in unit.layout)

    with mock.patch.object(GatherUnit, "_flats", look):
        step()
    return most / 1e9 if units else None


def _busy_ms(step: Any, table: Path | None, grid: ProcessGrid) -> float:
    """Milliseconds of a step in which some kernel ran, from a trace of one step, whose table goes to a file."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities if table else activities[:1]) as profiler:
        step()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, reached = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    if table and grid.rank == 0:
        averages = profiler.key_averages()
        parts = [averages.table(sort_by=f"self_{kind}_time_total", row_limit=60, max_name_column_width=90)
                 for kind in ("cuda", "cpu")]  # fmt: skip
        table.parent.mkdir(parents=True, exist_ok=True)
        table.write_text("\n".join(parts) + f"\n{len(spans)} kernels and copies\n")
    return busy / 1000


def _run(options: argparse.Namespace, clips: int) -> RunConfig:
    values = {
        "preset": options.preset,
        "deepspeed": str(options.deepspeed),
        "model": {"frames_per_chunk": 1},
        "data": {
            "frames": options.frames, "clips_per_step": clips, "max_micro_batch": 1,
            **({} if options.shards is None else {"shards": str(options.shards)}),
        },
        "parallel": {"sequence": options.sequence, "recompute": options.recompute},
        "train": {"steps": 10_000},
    }  # fmt: skip
    return validate(RunConfig, values, "tools.bench_step")


def _stage1(run: RunConfig, grid: ProcessGrid) -> dict[str, Any]:
    changed = run.model_copy(update={"deepspeed": str(ROOT / "ds_configs" / "zero1.json")})
    return deepspeed_config(changed, plan_batch(run.data.clips_per_step, grid.dp, 1), grid.world)


def _slowest(rate: float, grid: ProcessGrid) -> float:
    """The rate of the slowest rank: that is who the others wait for."""
    found = torch.tensor([rate], device=grid.device)
    if grid.world > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return float(found)


def _agree(found: list[float], first: list[float], bound: float) -> bool:
    return all(abs(a - b) <= bound * abs(b) for a, b in zip(found, first, strict=True))


def _size(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) % 2 == 0 and int(part) > 0 for part in parts):
        raise ConfigError(f"--latent {text}: expected two even numbers, for example 64x64")
    return int(parts[0]), int(parts[1])


def _title(options: argparse.Namespace, grid: ProcessGrid, matmul: float) -> str:
    return (
        f"{options.preset}, {options.frames} frames of {options.latent}, "
        f"{grid.world} x {torch.cuda.get_device_name()}, SP {grid.sp}, recompute {options.recompute}, "
        f"matmul {matmul:.0f} TFLOP/s"
    )


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


if __name__ == "__main__":
    main()
