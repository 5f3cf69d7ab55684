"""The weighted sum of the losses, and the one place where they are normalised.

Legend: B batch, F frames of the clip, _loc this rank's frames.

Every term is a sum over valid items divided by the number of such items in the whole optimizer step: all micro-batches,
all ranks. So the gradient of a step is that of one process with all clips, however they are dealt out.

The gradient convention of DeepSpeed, derived once: the engine averages gradients over all W ranks, and with
`scale_wrt_gas=False` it adds those of the micro-batches. Let L = sum_{m,r} S_{m,r} / N be the wanted loss, S_{m,r} the
local sum of micro-batch m on rank r and N the global count. If rank r backpropagates W * S_{m,r} / N, the engine ends
with (1/W) sum_{m,r} d(W S_{m,r} / N) = dL. DeepSpeed is not told about sequence parallelism, so its ranks count like
any others: their sums cover different frames of the same clip, and the exchanges' backwards are adjoints of the sum
over all ranks. Hence the factor W = world size for every ZeRO stage, and nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dualforce.config import LossConfig
from dualforce.losses.lip_sync import lip_items, lip_rows
from dualforce.types import FrameSigma, LossTerms


class LossCounts(NamedTuple):
    """Valid items, fp32 scalars: local ones add up to the global count of a step."""

    video: Tensor
    struct: Tensor
    flame: Tensor
    flame_fit: Tensor
    lip_sync: Tensor


class LossMasks(NamedTuple):
    """Which items count, for whole clips."""

    video: Tensor  # [B,F] bool
    struct: Tensor  # [B,F] bool
    flame: Tensor  # [B,F,Q] bool
    lip_items: Tensor  # [B,F] bool


class LossSums(NamedTuple):
    """Local sums over valid items; None where the run has no such term."""

    video: Tensor
    struct: Tensor
    flame: Tensor | None
    flame_fit: Tensor | None
    lip_sync: Tensor | None


def loss_masks(
    sigma: FrameSigma, valid: Tensor, flame_valid: Tensor, voiced: Tensor, max_lip_sigma: float
) -> LossMasks:
    """Clean and padded frames carry no velocity loss (model reference 1 and 5.2)."""
    return LossMasks(
        video=valid & (sigma.video > 0),
        struct=valid & (sigma.struct > 0),
        flame=flame_valid & valid[:, :, None],
        lip_items=lip_items(sigma.video, voiced, valid, max_lip_sigma),
    )


def loss_counts(masks: LossMasks, sigma: FrameSigma) -> LossCounts:
    """Counts over whole clips, so each clip must be counted by one rank of its sequence-parallel group."""
    noisy = masks.flame & (sigma.struct > 0)[:, :, None]
    rows = lip_rows(masks.lip_items)
    return LossCounts(*(x.sum().float() for x in (masks.video, masks.struct, noisy, masks.flame, rows)))


def flame_weight(config: LossConfig, step: int) -> float:
    """lam_f(k) = lam_f max(0, 1 - k / K_f)."""
    return config.flame * max(0.0, 1 - step / config.flame_steps)


def total_loss(sums: LossSums, counts: LossCounts, config: LossConfig, step: int, world: int) -> LossTerms:
    """This rank's share of every term (they add up over ranks and micro-batches); `total` is what it backpropagates."""
    video, struct, flame, flame_fit, lip_sync = (
        None if x is None else x / n.clamp_min(1) for x, n in zip(sums, counts, strict=True)
    )
    if video is None or struct is None:
        raise ValueError("the velocity sums are always present")
    both_flame = None if flame is None or flame_fit is None else flame + flame_fit
    total = video + config.struct * struct
    for weight, term in ((flame_weight(config, step), both_flame), (config.lip_sync, lip_sync)):
        if term is not None:
            total = total + weight * term
    return LossTerms(video, struct, both_flame, lip_sync, world * total)


def stack_counts(counts: list[LossCounts]) -> Tensor:
    """Sum over micro-batches, [5] fp64 (exact for any count), ready for one all-reduce."""
    return torch.stack([torch.stack(tuple(c)).double() for c in counts]).sum(0)
