"""Validation on the held-out split at fixed noise levels, beside what a linear predictor could do.

Legend: L levels, F frames, _loc this rank's frames, C latent channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from data_shards.reader import ShardReader
from dualforce.data.collate import collate
from dualforce.data.order import ClipRef
from dualforce.data.statistics import StreamStatistics
from dualforce.diffusion.frame_noise import draw_fixed
from dualforce.diffusion.schedule import fixed_levels
from dualforce.train.step import StepContext, prepare, with_counts
from dualforce.train.train_module import StepInput, StepOutput
from dualforce.types import ClipBatch


class HeldOut(NamedTuple):
    """The validation split of a set, how many latent frames of its clips are looked at, its name in logs, and how to
    read it."""

    reader: ShardReader
    frames: int
    name: str
    statistics: StreamStatistics
    audio_context: int
    text_dim: int

    def clip(self, index: int, copies: int) -> ClipBatch:
        """Clip `index`, `copies` times."""
        refs = [ClipRef(0, index, index)] * copies
        sample = self.reader.read(index)
        return collate([sample] * copies, refs, self.statistics, self.frames, self.audio_context, self.text_dim)


class Moments(NamedTuple):
    """Sums over validation frames and pixels for each level and channel, [L,C] fp64: enough for a linear fit."""

    n: Tensor
    x: Tensor
    v: Tensor
    xx: Tensor
    xv: Tensor
    vv: Tensor

    def linear_residual(self) -> Tensor:
        """Mean squared error of the best v = a x + b for each level and channel, [L,C]."""
        mean_x, mean_v = self.x / self.n, self.v / self.n
        cov_xx = self.xx / self.n - mean_x**2
        cov_xv = self.xv / self.n - mean_x * mean_v
        cov_vv = self.vv / self.n - mean_v**2
        return cov_vv - cov_xv**2 / cov_xx.clamp_min(1e-12)


def validate(engine: Any, held_out: Sequence[HeldOut], context: StepContext) -> dict[str, Any]:
    """Mean velocity errors over levels and clips: of the model (`video`, `struct`), of the best linear predictor per
    channel and level on the same data (`video_linear`), and of predicting zero, which an untrained model does
    (`video_zero`). Collective: every rank calls it. Frame 0 is clean and not counted.

    Clips are up to `train.validation_clips` of every set. Where there are several sets, means are over the frames of
    all, the linear predictor is one for each set, and `video/NAME` and the like are of each set alone.
    Raises ValueError without a set."""
    if not held_out:
        raise ValueError("the validation split has no clips")
    grid, levels = context.grid, fixed_levels(context.run.train.validation_sigmas)
    engine.eval()
    found = [_over_clips(engine, one, levels, context) for one in held_out]
    engine.train()
    sums, moments = (torch.stack(part) for part in zip(*found, strict=True))
    if grid.world > 1:
        dist.all_reduce(sums, group=grid.world_group)
        dist.all_reduce(moments, group=grid.world_group)
    reports = [_report(one.cpu(), Moments(*two.cpu().unbind()), levels) for one, two in zip(sums, moments, strict=True)]
    if len(reports) == 1:
        return reports[0]
    alone = {
        f"{key}/{one.name}": report[key]
        for one, report in zip(held_out, reports, strict=True)
        for key in ("video", "struct", "video_linear", "video_zero")
    }
    return _mean(reports, sums[:, 2].sum(1).tolist()) | alone


def _mean(reports: Sequence[dict[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
    """Mean of every number of the reports."""
    found: dict[str, Any] = {}
    for key in reports[0]:
        rows = torch.tensor([report[key] for report in reports], dtype=torch.float64)
        shares = torch.tensor(weights, dtype=torch.float64).view(-1, *([1] * (rows.ndim - 1)))
        found[key] = ((shares * rows).sum(0) / shares.sum()).tolist()
    return found


def _over_clips(engine: Any, held_out: HeldOut, levels: Tensor, context: StepContext) -> tuple[Tensor, Tensor]:
    """This rank's error sums [3,L] and stacked Moments [6,L,C] over the clips of a set."""
    run, grid = context.run, context.grid
    clips = min(len(held_out.reader), run.train.validation_clips)
    # No larger a forward than in training, whose memory may be all that is free.
    parts = levels.split(run.data.max_micro_batch)
    sums: list[Tensor] = []
    moments: list[Tensor] = []
    # Every rank runs the same number of forwards, because each is collective; surplus ones count nothing.
    for first in range(0, clips, grid.dp):
        index = first + grid.dp_rank
        found = [_measured(engine, held_out, index, clips, part.tolist(), context) for part in parts]
        sums.append(torch.cat([errors for errors, _ in found], dim=1))
        moments.append(torch.cat([more for _, more in found], dim=1))
    return torch.stack(sums).sum(0), torch.stack(moments).sum(0)


def _measured(
    engine: Any, held_out: HeldOut, index: int, clips: int, levels: list[float], context: StepContext
) -> tuple[Tensor, Tensor]:
    """Error sums [3,L] and stacked Moments [6,L,C] of a clip at `levels`, zero where `index` is beyond the clips."""
    batch = held_out.clip(index % clips, len(levels))
    if index >= clips:
        batch = batch._replace(valid=torch.zeros_like(batch.valid))
    inputs, output = forward(engine, batch, levels, context)
    return _error_sums(inputs, output), _moments(inputs)


def forward(engine: Any, batch: ClipBatch, levels: list[float], context: StepContext) -> tuple[StepInput, StepOutput]:
    """The engine's prediction for a batch with clip b at `levels[b]`. Collective."""
    drawn = draw_fixed(batch, levels, context.run.train.seed)
    inputs = with_counts([prepare(batch, drawn, context)], context.grid)[0]
    with torch.no_grad():
        return inputs, engine(
            inputs, context.path(inputs.target.video.shape[1] * context.grid.sp), 0, context.grid.world
        )


def _error_sums(inputs: StepInput, output: StepOutput) -> Tensor:
    """[3,L]: video errors, structure errors, frames."""
    video, struct = (
        (getattr(output.errors, name).double() * getattr(inputs.masks, name)).sum(1) for name in ("video", "struct")
    )
    return torch.stack((video, struct, inputs.masks.video.double().sum(1)))


def _moments(inputs: StepInput) -> Tensor:
    """Local Moments stacked, [6,L,C]."""
    mask = inputs.masks.video.double()[:, :, None, None, None]
    x, v = inputs.noised.video.double(), inputs.target.video.double()
    products = (torch.ones_like(x), x, v, x * x, x * v, v * v)
    return torch.stack([(mask * product).sum((1, 3, 4)) for product in products])


def _report(sums: Tensor, moments: Moments, levels: Tensor) -> dict[str, Any]:
    video, struct = sums[0] / sums[2], sums[1] / sums[2]
    linear = moments.linear_residual().mean(1)
    zero = (moments.vv / moments.n).mean(1)
    return {
        "video": video.mean().item(),
        "struct": struct.mean().item(),
        "video_linear": linear.mean().item(),
        "video_zero": zero.mean().item(),
        "video_at_sigma": video.tolist(),
        "video_linear_at_sigma": linear.tolist(),
        "sigma": levels.tolist(),
    }


def sample_frames(engine: Any, held_out: HeldOut, context: StepContext, level: float = 0.55) -> dict[str, Tensor]:
    """Latents [F,C,H,W] of the first held-out clip: `clean`, `noised` at `level`, and `denoised` in one step; not
    denormalised. Collective."""
    batch = held_out.clip(0, 1)
    engine.eval()
    inputs, output = forward(engine, batch, [level], context)
    engine.train()
    path = context.path(inputs.target.video.shape[1] * context.grid.sp)
    sigma = inputs.noised.sigma.video[..., None, None, None]
    denoised = path.gather(inputs.noised.video - sigma * output.predicted.video)
    noised, frames = path.gather(inputs.noised.video), batch.video.shape[1]
    return {"clean": batch.video[0], "noised": noised[0, :frames].cpu(), "denoised": denoised[0, :frames].cpu()}
