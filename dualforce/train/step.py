"""One optimizer step: draw noise, count what counts, forward and backward every micro-batch.

Legend: B batch, F frames of the clip, _loc this rank's frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    _paths: dict[int, FullPath] = field(default_factory=dict, repr=False, compare=False)

    def path(self, frames: int) -> FullPath:
        """Attention over clips of `frames` (padded) latent frames; one object a length, as kernels prepare for each."""
        if frames not in self._paths:
            self._paths[frames] = FullPath(self.rule, self.kernels, FrameSpan(0, frames), self.grid)
        return self._paths[frames]


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


PreparedStep = list[tuple[StepInput, LossCounts]]


def prepare_step(batches: list[ClipBatch], context: StepContext) -> PreparedStep:
    """Draw the noise of a rank's micro-batches and prepare them, in page-locked memory where the device is a GPU: work
    for the thread that reads ahead."""
    seed, chunk = context.run.train.seed, context.rule.frames_per_chunk
    prepared = [prepare(batch, draw(batch, context.run.noise, seed, chunk), context) for batch in batches]
    return [(_mapped(inputs, _page_locked), counts) for inputs, counts in prepared] if _on_gpu(context) else prepared


def _on_gpu(context: StepContext) -> bool:
    return context.grid.device.type == "cuda"


def with_counts(inputs: PreparedStep, grid: ProcessGrid) -> list[StepInput]:
    """Move the micro-batches of a step to the device and give each the counts of the whole step."""
    counts = stack_counts([count for _, count in inputs]).to(grid.device, non_blocking=True)
    if grid.world > 1:
        dist.all_reduce(counts, group=grid.world_group)
    total = LossCounts(*counts.float().unbind())

    def moved(x: Tensor) -> Tensor:
        return x.to(grid.device, non_blocking=True)

    return [_mapped(batch, moved)._replace(counts=total) for batch, _ in inputs]


def train_step(
    engine: Any,
    prepared: PreparedStep,
    context: StepContext,
    step: int,
    record: Callable[[StepInput, StepOutput], None],
) -> Any:
    """Accumulate all micro-batches of optimizer step `step` and update the weights; `record` sees each micro-batch.

    Returns the global gradient norm before clipping, as a number or a tensor on the device.
    """
    for inputs in with_counts(prepared, context.grid):
        path = context.path(inputs.target.video.shape[1] * context.grid.sp)
        output = engine(inputs, path, step, context.grid.world)
        # A tensor of its own: DeepSpeed 0.19.8 would take the output itself for one of a backward pass that it does not
        # run, and divide its gradient by the accumulation steps where no ZeRO stage is on.
        engine.backward(output.terms.total.clone(), scale_wrt_gas=False)
        record(inputs, output)
        norm = _plain_norm(engine)
        with _left_out_unless_finite(engine, norm):
            engine.step()
    return norm if norm is not None else engine.get_global_grad_norm()


def _plain_norm(engine: Any) -> Tensor | None:
    """The norm where DeepSpeed clips without keeping it: fp32 without ZeRO, whose gradients are whole on every rank."""
    if engine.zero_optimization() or engine.bfloat16_enabled() or not engine.is_gradient_accumulation_boundary():
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


@contextmanager
def _left_out_unless_finite(engine: Any, norm: Tensor | None) -> Iterator[None]:
    """For the optimizer whose norm is taken here (`norm`) what DeepSpeed's others do themselves: where a gradient is
    not finite, the weights of all ranks stay as they are. Waits for the device, as the others do."""
    if norm is None:
        yield
        return
    optimizer = engine.optimizer
    step = optimizer.step
    optimizer.overflow = not bool(norm.isfinite())  # then DeepSpeed counts a skipped step, and leaves the rate
    if optimizer.overflow:
        optimizer.step = lambda *args, **more: None
    try:
        yield
    finally:
        optimizer.step = step


def _page_locked(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)  # one copy, also of a slice


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """NamedTuples of tensors with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        items = [_mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
