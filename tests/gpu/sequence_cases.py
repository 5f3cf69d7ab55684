"""What each of two processes of `test_sequence_gpu.py` runs: `small` with its clips shared by both, to the end."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dualforce import launch
from dualforce.config import LossConfig, ModelOverrides, RunConfig, validate
from dualforce.model.path import ChunkRule
from dualforce.presets import build_model_config
from dualforce.train.engine import build_engine, close_engine
from dualforce.train.step import StepContext, train_step
from dualforce.train.train_module import TrainModule
from megatron_ext.kernels.kernel_set import select_kernels
from megatron_ext.parallel.grid import ProcessGrid
from tools.bench.clips import synthetic_step

STEPS, FRAMES, LATENT = 6, 6, (16, 16)


def engine_config(world: int) -> dict[str, Any]:
    adamw = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "torch_adam": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world,
        "gradient_clipping": 1.0,
        "steps_per_print": None,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False, "contiguous_gradients": False},
        "optimizer": {"type": "AdamW", "params": adamw},
    }


def train(grid: ProcessGrid, kernels: str, recompute: Any, graphs: bool) -> list[float]:
    """Losses of six steps, summed over the ranks; the engine is closed."""
    model = build_model_config("small", struct_dim=70, audio_dim=80, overrides=ModelOverrides(frames_per_chunk=1))
    chosen = select_kernels(kernels, grid.device, torch.bfloat16, model.head_dims)
    values = {"preset": "small", "deepspeed": "unused", "data": {"frames": FRAMES, "clips_per_step": 1},
              "train": {"steps": STEPS}, "parallel": {"sequence": grid.sp}}  # fmt: skip
    rule = ChunkRule(model.frames_per_chunk, model.window, model.sink)
    context = StepContext(validate(RunConfig, values, "test"), grid, chosen, rule)
    launch.seed_everything(0)
    build = partial(TrainModule, model, LossConfig(), chosen, 56)
    engine = build_engine(lambda place: build(place), engine_config(grid.world), grid, recompute, graphs)
    step = synthetic_step(model, context, frames=FRAMES, latent=LATENT, text_tokens=7, clips=1, seed=0)
    losses = torch.zeros(STEPS, device=grid.device)

    def record(number: int, _: Any, output: Any) -> None:
        losses[number] += output.terms.total.detach()

    for number in range(STEPS):
        train_step(engine, step, context, number, partial(record, number))
    torch.distributed.all_reduce(losses)
    close_engine(engine)
    return (losses / grid.world).tolist()


def main() -> None:
    grid = launch.start(2, seed=0)
    kernels = "fused" if grid.device.type == "cuda" else "reference"
    rows = {}
    for recompute in ("none", "full"):
        for graphs in (False, True):
            rows[f"{recompute} {graphs}"] = train(grid, kernels, recompute, graphs)
    if grid.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(rows))
    launch.finish()


if __name__ == "__main__":
    main()
