"""What the engine wraps: the model and the loss heads, because the engine may be entered through one forward only.

Legend: B batch, F frames of the clip (padded), _loc this rank's frames, Q structure tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dualforce.config import LossConfig, ModelConfig
from dualforce.losses.flame import FlameHead
from dualforce.losses.flow import frame_errors
from dualforce.losses.lip_sync import LipSyncHead
from dualforce.losses.total import LossCounts, LossMasks, LossSums, total_loss
from dualforce.model.dual_tower import DualTower
from dualforce.model.path import FullPath
from dualforce.model.placement import Place, in_place
from dualforce.types import Conditioning, LossTerms, Noised, Velocity
from megatron_ext.kernels.kernel_set import KernelSet


class StepInput(NamedTuple):
    """One micro-batch on the device. Per-frame tensors hold this rank's frames, `masks.lip_items` the whole clip's."""

    noised: Noised
    target: Velocity
    cond: Conditioning
    clean_struct: Tensor  # [B,F_loc,Q,Cs]
    flame: Tensor  # [B,F_loc,Q,Cf]
    masks: LossMasks
    counts: LossCounts  # of the whole optimizer step


class StepOutput(NamedTuple):
    """`terms.total` is what this rank backpropagates; everything else is for logging and carries no gradient."""

    terms: LossTerms
    errors: Velocity  # mean squared error per frame, [B,F_loc] each
    predicted: Velocity
    lip: Tensor  # [2] lip-sync rows that name their own partner first, and rows


class TrainModule(nn.Module):
    """DualTower and loss heads. A head exists when its loss has a weight (and, for FLAME, the shards have FLAME)."""

    def __init__(
        self, config: ModelConfig, loss: LossConfig, kernels: KernelSet, flame_dim: int | None, place: Place = in_place
    ) -> None:
        super().__init__()
        self.model = DualTower(config, kernels, place)
        self.heads = nn.ModuleDict()
        if loss.flame > 0 and flame_dim is not None:
            self.heads["flame"] = place(lambda: FlameHead(config.struct.out_dim, flame_dim))
        if loss.lip_sync > 0:
            self.heads["lip_sync"] = place(lambda: LipSyncHead(config.video.out_dim, config.audio.dim, loss.lip))
        self._loss = loss

    def forward(self, inputs: StepInput, path: FullPath, step: int, world: int) -> StepOutput:
        """One micro-batch of optimizer step `step`; `world` is the number of ranks over which the engine averages."""
        noised, target, masks = inputs.noised, inputs.target, inputs.masks
        predicted = self.model(noised, inputs.cond, path.local, path)
        errors = Velocity(*(frame_errors(p, t) for p, t in zip(predicted, target, strict=True)))
        flame, flame_fit = self._flame(inputs, predicted)
        lip, lip_score = self._lip(inputs, predicted, path)
        sums = LossSums((errors.video * masks.video).sum(), (errors.struct * masks.struct).sum(), flame, flame_fit, lip)
        terms = total_loss(sums, inputs.counts, self._loss, step, world)
        return StepOutput(terms, _detached(errors), _detached(predicted), lip_score)

    def _flame(self, inputs: StepInput, predicted: Velocity) -> tuple[Tensor | None, Tensor | None]:
        if "flame" not in self.heads:
            return None, None
        sigma = inputs.noised.sigma.struct
        denoised = inputs.noised.struct - sigma[..., None, None] * predicted.struct
        return self.heads["flame"](inputs.clean_struct, denoised, inputs.flame, sigma, inputs.masks.flame)

    def _lip(self, inputs: StepInput, predicted: Velocity, path: FullPath) -> tuple[Tensor | None, Tensor]:
        if "lip_sync" not in self.heads:
            return None, predicted.video.new_zeros(2)
        sigma = inputs.noised.sigma.video
        denoised = inputs.noised.video - sigma[..., None, None, None] * predicted.video
        sums = self.heads["lip_sync"](
            denoised, inputs.cond.audio, sigma, inputs.masks.lip_items, path.local.start, path.gather
        )
        return sums.loss, torch.stack((sums.hits.detach(), sums.rows.to(sums.hits.dtype)))


def _detached(pair: Velocity) -> Velocity:
    return Velocity(pair.video.detach(), pair.struct.detach())
