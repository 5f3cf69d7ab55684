"""One optimizer step: draw noise, count what counts, forward and backward every micro-batch.

Legend: B batch, F frames of the clip, _loc this rank's frames.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dualforce.config import RunConfig
from dualforce.data.collate import pad_frames
from dualforce.diffusion.frame_noise import Draw, draw, mix, pad_draw
from dualforce.losses.total import LossCounts, loss_counts, loss_masks, stack_counts
from dualforce.model.path import ChunkRule, FullPath
from dualforce.train.train_module import StepInput, StepOutput
from dualforce.types import ClipBatch, FrameSigma, FrameSpan, Noised, Velocity
from megatron_ext.kernels.kernel_set import KernelSet
from megatron_ext.parallel.grid import ProcessGrid
from megatron_ext.parallel.ulysses import shard_frames


@dataclass(frozen=True)
class StepContext:
    """What every step needs and no step changes."""

    run: RunConfig
    grid: ProcessGrid
    kernels: KernelSet
    rule: ChunkRule

    def path(self, frames: int) -> FullPath:
        """Attention over clips of `frames` (padded) latent frames."""
        return FullPath(self.rule, self.kernels, FrameSpan(0, frames), self.grid)


def prepare(batch: ClipBatch, drawn: Draw, context: StepContext) -> tuple[StepInput, LossCounts]:
    """Mix in the drawn noise, pad to the sequence-parallel size, and cut out this rank's frames, all on the CPU.

    The returned counts are of whole clips and zero on all but the first rank of a sequence-parallel group, so that
    their sum over all ranks counts every clip once; the input's own counts are set by `with_counts`.
    """
    batch = pad_frames(batch, context.grid.sp)
    drawn = pad_draw(drawn, batch.video.shape[1])
    masks = loss_masks(drawn.sigma, batch.valid, batch.flame_valid, batch.voiced, context.run.loss.lip.max_sigma)
    counts = loss_counts(masks, drawn.sigma)
    if context.grid.sp_rank:
        counts = LossCounts(*(torch.zeros_like(count) for count in counts))
    noised, target, cond = mix(batch, drawn)

    def own(x: Tensor) -> Tensor:
        return shard_frames(x, context.grid)

    local = StepInput(
        noised=Noised(own(noised.video), own(noised.struct), FrameSigma(*map(own, noised.sigma))),
        target=Velocity(*map(own, target)),
        cond=cond._replace(audio=own(cond.audio)),
        clean_struct=own(batch.struct),
        flame=own(batch.flame),
        masks=masks._replace(video=own(masks.video), struct=own(masks.struct), flame=own(masks.flame)),
        counts=counts,
    )
    return local, counts


def with_counts(inputs: list[tuple[StepInput, LossCounts]], grid: ProcessGrid) -> list[StepInput]:
    """Move the micro-batches of a step to the device and give each the counts of the whole step."""
    counts = stack_counts([count for _, count in inputs]).to(grid.device, non_blocking=True)
    if grid.world > 1:
        dist.all_reduce(counts, group=grid.world_group)
    total = LossCounts(*counts.float().unbind())
    return [_to_device(batch, grid.device)._replace(counts=total) for batch, _ in inputs]


def train_step(
    engine: Any,
    batches: list[ClipBatch],
    context: StepContext,
    step: int,
    record: Callable[[StepInput, StepOutput], None],
) -> Any:
    """Accumulate all micro-batches of optimizer step `step` and update the weights; `record` sees each micro-batch.

    Returns the global gradient norm before clipping, as a number or a tensor on the device.
    """
    seed, chunk = context.run.train.seed, context.rule.frames_per_chunk
    drawn = [prepare(batch, draw(batch, context.run.noise, seed, chunk), context) for batch in batches]
    for inputs in with_counts(drawn, context.grid):
        path = context.path(inputs.target.video.shape[1] * context.grid.sp)
        output = engine(inputs, path, step, context.grid.world)
        # A tensor of its own: DeepSpeed 0.19.8 would take the output itself for one of a backward pass that it does not
        # run, and divide its gradient by the accumulation steps where no ZeRO stage is on.
        engine.backward(output.terms.total.clone(), scale_wrt_gas=False)
        record(inputs, output)
        norm = _plain_norm(engine)
        engine.step()
    return norm if norm is not None else engine.get_global_grad_norm()


def _plain_norm(engine: Any) -> Tensor | None:
    """The norm where DeepSpeed clips without keeping it: fp32 without ZeRO, whose gradients are whole on every rank."""
    if engine.zero_optimization() or engine.bfloat16_enabled() or not engine.is_gradient_accumulation_boundary():
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def _to_device(value: Any, device: torch.device) -> Any:
    """NamedTuples of tensors, moved; page-locked first where that makes the copy asynchronous."""
    if isinstance(value, Tensor):
        staged = value.contiguous().pin_memory() if device.type == "cuda" else value
        return staged.to(device, non_blocking=True)
    if isinstance(value, tuple):
        moved = [_to_device(item, device) for item in value]
        return type(value)(*moved) if hasattr(value, "_fields") else tuple(moved)
    return value
