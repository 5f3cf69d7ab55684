"""Training with CUDA graphs is training without them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch

from dualforce import launch
from dualforce.config import LossConfig, ModelOverrides, RunConfig, validate
from dualforce.model.path import ChunkRule
from dualforce.presets import build_model_config
from dualforce.train import recompute as recompute_module
from dualforce.train.engine import build_engine
from dualforce.train.step import StepContext, train_step
from dualforce.train.train_module import TrainModule
from megatron_ext.kernels.kernel_set import KernelsUnavailable, select_kernels
from megatron_ext.parallel.grid import ProcessGrid
from tools.bench.clips import synthetic_step

pytestmark = pytest.mark.gpu

STEPS, CLIPS, FRAMES, LATENT = 6, 2, 5, (16, 16)


@pytest.fixture(scope="module")
def grid() -> ProcessGrid:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return launch.start(1, seed=0)


def engine_config(stage: int) -> dict[str, Any]:
    """One clip a micro-batch, so that every step accumulates two; no warm-up, so that the heads leave zero at once."""
    adamw = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "torch_adam": True}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": CLIPS,
        "train_batch_size": CLIPS,
        "gradient_clipping": 1.0,
        "steps_per_print": None,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "memory_efficient_linear": False},
        "optimizer": {"type": "AdamW", "params": adamw},
    }


Size = tuple[int, tuple[int, int]]
ONE_SIZE: list[Size] = [(FRAMES, LATENT)] * STEPS


def train(grid: ProcessGrid, stage: int, recompute: Any, graphs: bool, sizes: list[Size] = ONE_SIZE) -> list[float]:
    """Losses of `small`, from the same start, in steps on clips of `sizes` (frames, latent height and width), always
    the same ones of a size."""
    model = build_model_config("small", struct_dim=70, audio_dim=80, overrides=ModelOverrides(frames_per_chunk=2))
    try:
        kernels = select_kernels("fused", grid.device, torch.bfloat16, model.head_dims)
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    values = {"preset": "small", "deepspeed": "unused", "data": {"frames": FRAMES}, "train": {"steps": STEPS}}
    context = StepContext(
        validate(RunConfig, values, "test"), grid, kernels, ChunkRule(model.frames_per_chunk, model.window, model.sink)
    )
    launch.seed_everything(0)
    build = partial(TrainModule, model, LossConfig(), kernels, 56)
    engine = build_engine(lambda place: build(place), engine_config(stage), grid, recompute, graphs)
    steps = {
        size: synthetic_step(model, context, frames=size[0], latent=size[1], text_tokens=7, clips=CLIPS, seed=0)
        for size in dict.fromkeys(sizes)
    }
    losses = []
    for number, size in enumerate(sizes):
        shares: list[torch.Tensor] = []

        def record(_: Any, out: Any, shares: list[torch.Tensor] = shares) -> None:
            shares.append(out.terms.total.detach())

        train_step(engine, steps[size], context, number, record)
        losses.append(float(sum(shares)))
    engine.destroy()
    return losses


def test_offloaded_inputs_change_nothing(grid: ProcessGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute_module, "OFFLOAD_BYTES", 1024)  # the clips here are small
    plain, offloaded = (train(grid, 3, recompute, False) for recompute in ("none", "offload"))
    assert max(abs(a - b) / abs(b) for a, b in zip(offloaded, plain, strict=True)) < 1e-2


@pytest.mark.parametrize(("stage", "recompute"), [(3, "none"), (3, "full"), (1, "none")])
def test_graphs_change_nothing(grid: ProcessGrid, stage: int, recompute: Any) -> None:
    """Same kernels on the same numbers: only flash-attn-4's dq, added up by atomics, differs in its last bits, which
    six AdamW steps carry on. The step in which graphs are captured and those that replay them are all among the six."""
    plain, graphed = (train(grid, stage, recompute, graphs) for graphs in (False, True))
    print(plain, graphed)
    assert all(map(math.isfinite, plain)) and plain[-1] < 0.97 * plain[0]
    assert max(abs(a - b) / abs(b) for a, b in zip(graphed, plain, strict=True)) < 1e-2


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_graphs_of_several_sizes_change_nothing(grid: ProcessGrid, recompute: Any) -> None:
    """Three sizes by turns in one memory. A graph that spoilt another's tensors would show in the losses after it."""
    large, small, long = (5, (32, 32)), (5, (16, 16)), (9, (16, 16))
    sizes: list[Size] = [large, small, long, large, large, small, small, large, long, small, long, large, long, small]
    plain, graphed = (train(grid, 3, recompute, graphs, sizes) for graphs in (False, True))
    print(plain, graphed)
    assert all(map(math.isfinite, plain)) and plain[-3] < 0.97 * plain[0]
    # As above, over fourteen steps.
    assert max(abs(a - b) / abs(b) for a, b in zip(graphed, plain, strict=True)) < 2e-2
