"""Processes of ZeRO-3, on GPUs if there are any: the step beside DeepSpeed's own, and how much is whole at once."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from dualforce import launch
from dualforce.model.placement import Place
from dualforce.train import engine as engine_module
from dualforce.train import zero3
from dualforce.train.gather_unit import GatherUnit
from megatron_ext.kernels.adamw.reference import adamw_step

WIDTH, LAYERS, STEPS, SPOILT = 24, 8, 6, 3
CLIP = 0.05


class Layer(nn.Module):
    """Two outputs, as a layer of two towers has: DeepSpeed's hooks before the backward run once for each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH + 1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + torch.tanh(self.first(y)), y + torch.tanh(self.second(x))[..., 1:]


class Stack(nn.Module):
    def __init__(self, place: Place) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(place(Layer) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            x, y = layer(x, y)
        return (x * y).float().square().mean()


def config(bf16: bool, accumulation: int, world: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": accumulation * world,
        "gradient_clipping": CLIP,
        "steps_per_print": None,
        "bf16": {"enabled": bf16},
        "data_types": {"grad_accum_dtype": "bf16" if bf16 and accumulation == 1 else "fp32"},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 100, "contiguous_gradients": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }


def train(engine: Any, dtype: torch.dtype, accumulation: int) -> dict[str, Any]:
    """Norms, the fp32 weights after the first step, whether a step moved them, and the most whole parameters.

    Step SPOILT has an infinite input.
    """
    source = torch.Generator().manual_seed(1 + dist.get_rank())
    norms, moved, first, most = [], [], [], 0

    def look(unit: GatherUnit) -> tuple[Tensor, ...]:
        nonlocal most
        flats = [flat for one in engine.module.layers for flat in one.parameters()]
        most = max(most, sum(flat.ds_numel for flat in flats if flat.ds_status != ZeroParamStatus.NOT_AVAILABLE))
        return tuple(getattr(unit, flat) for flat in unit.layout)

    masters, copies = engine.optimizer.fp32_partitioned_groups_flat, engine.optimizer.fp16_partitioned_groups_flat
    straight = mock.Mock(wraps=zero3.average_scattered)
    for step in range(STEPS):
        before = [flat.detach().clone() for flat in masters]
        for _ in range(accumulation):
            x = torch.randn(5, WIDTH, generator=source).to(masters[0].device, dtype)
            x[0, 0] = torch.inf if step == SPOILT else x[0, 0]
            with (
                mock.patch.object(GatherUnit, "_flats", look),
                mock.patch.object(zero3, "average_scattered", straight),
            ):
                engine.backward(engine(x).clone(), scale_wrt_gas=False)
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
        moved.append(any(not torch.equal(a, b) for a, b in zip(before, masters, strict=True)))
        first = first or [flat.tolist() for flat in masters]
    return {
        "norms": norms,
        "moved": moved,
        "straight": straight.call_count,
        "one pass": isinstance(engine.optimizer, zero3._OnePassAdamW),
        "whole": most,
        "unit": max(sum(flat.ds_numel for flat in unit.parameters()) for unit in engine.module.layers),
        "first": first,
        "copied": all(torch.equal(a.to(b.dtype), b) for a, b in zip(masters, copies, strict=True)),
    }


STEPS_OF = {
    "ours": contextlib.nullcontext,
    "one-pass": lambda: mock.patch.object(zero3, "_one_pass", lambda optimizer: adamw_step),  # else a GPU's alone
    "deepspeed": lambda: mock.patch.object(engine_module, "lean_step", lambda engine: None),
}


def main() -> None:
    grid, rows = launch.start(1, seed=0), {}
    for bf16, accumulation in ((False, 1), (True, 1), (True, 2)):
        for name, other in STEPS_OF.items():
            with other():
                engine = engine_module.build_engine(Stack, config(bf16, accumulation, grid.world), grid)
            found = train(engine, torch.bfloat16 if bf16 else torch.float32, accumulation)
            rows[f"{name} {'bf16' if bf16 else 'fp32'} x{accumulation}"] = found
            engine.destroy()
    if grid.rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
