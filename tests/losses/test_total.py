"""The sum of the losses and its normalisation: what counts, and that it does not matter how clips are dealt out."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from helpers.plain_batch import plain_batch
from helpers.tiny_model import randomise
from torch import Tensor, nn

from dualforce.config import LipSyncConfig, LossConfig
from dualforce.losses.flame import FlameHead
from dualforce.losses.flow import frame_errors
from dualforce.losses.lip_sync import LipSyncHead
from dualforce.losses.total import (
    LossCounts,
    LossMasks,
    LossSums,
    flame_weight,
    loss_counts,
    loss_masks,
    stack_counts,
    total_loss,
)
from dualforce.types import ClipBatch, FrameSigma, LossTerms, Velocity

LOSS = LossConfig(lip=LipSyncConfig(dim=8))
B, F = 4, 6
STEP = 2500  # the FLAME weight is at 3/4 of its start


class Heads(nn.Module):
    """The loss heads, and sums of a part of a batch as a rank computes them."""

    def __init__(self) -> None:
        super().__init__()
        self.flame = FlameHead(6, 7)
        self.lip = LipSyncHead(4, 5, LOSS.lip)
        randomise(self)

    def sums(self, case: Case, masks: LossMasks, start: int, stop: int) -> LossSums:
        """Sums over frames start..stop; the keys of the lip sync are gathered from all frames."""
        batch, sigma, predicted = case.batch, case.sigma, case.predicted
        own = (slice(None), slice(start, stop))
        errors = Velocity(*(frame_errors(p[own], t[own]) for p, t in zip(predicted, case.target, strict=True)))
        struct = batch.struct + sigma.struct[..., None, None] * (case.target.struct - predicted.struct)
        video = batch.video + sigma.video[..., None, None, None] * (case.target.video - predicted.video)
        flame = self.flame(batch.struct[own], struct[own], batch.flame[own], sigma.struct[own], masks.flame[own])
        seen: list[Tensor] = []
        self.lip(video, batch.audio, sigma.video, masks.lip_items, 0, lambda x: (seen.append(x), x)[1])
        lip = self.lip(video[own], batch.audio[own], sigma.video[own], masks.lip_items, start, lambda _: seen[0])
        return LossSums(
            (errors.video * masks.video[own]).sum(), (errors.struct * masks.struct[own]).sum(), *flame, lip.loss
        )


class Case:
    """A batch with levels and predictions; clips and frames can be cut out."""

    def __init__(self, batch: ClipBatch, sigma: FrameSigma, target: Velocity, predicted: Velocity) -> None:
        self.batch, self.sigma, self.target, self.predicted = batch, sigma, target, predicted

    @classmethod
    def random(cls) -> Case:
        source = torch.Generator().manual_seed(1)
        batch = plain_batch([(0, i) for i in range(B)], F)
        sigma = FrameSigma(*(torch.rand(B, F, generator=source) for _ in range(2)))
        sigma.video[:, 0] = sigma.struct[:, 0] = 0.0
        sigma.video[1, 1:3] = 0.0
        batch.voiced[2, 2:4] = False
        batch.flame_valid[3, 1:] = False
        target, predicted = (
            Velocity(*(torch.randn(x.shape, generator=source) for x in (batch.video, batch.struct))) for _ in range(2)
        )
        return cls(batch, sigma, target, predicted)

    def clips(self, start: int, stop: int) -> Case:
        own = slice(start, stop)
        batch = ClipBatch(*(x[own] for x in self.batch))
        sigma = FrameSigma(*(x[own] for x in self.sigma))
        return Case(batch, sigma, *(Velocity(*(x[own] for x in pair)) for pair in (self.target, self.predicted)))

    def padded(self, frames: int, filling: float) -> Case:
        """Frames appended at the end, marked as padding, with predictions of any value."""

        def grown(x: Tensor, value: float = 0.0) -> Tensor:
            extra = x.new_full((x.shape[0], frames - x.shape[1], *x.shape[2:]), value)
            return torch.cat((x, extra), dim=1)

        per_frame = ("video", "struct", "audio", "flame", "flame_valid", "voiced", "valid")
        batch = self.batch._replace(**{name: grown(getattr(self.batch, name)) for name in per_frame})
        sigma, target = FrameSigma(*map(grown, self.sigma)), Velocity(*map(grown, self.target))
        return Case(batch, sigma, target, Velocity(*(grown(x, filling) for x in self.predicted)))

    def masks(self) -> LossMasks:
        batch = self.batch
        return loss_masks(self.sigma, batch.valid, batch.flame_valid, batch.voiced, LOSS.lip.max_sigma)

    def counts(self) -> LossCounts:
        return loss_counts(self.masks(), self.sigma)


def terms_of(heads: Heads, parts: list[Case], cuts: list[int]) -> tuple[LossTerms, list[Tensor]]:
    """All terms and the gradients when `parts` are micro-batches and frames are dealt to ranks at `cuts`."""
    counts = LossCounts(*stack_counts([part.counts() for part in parts]).float())
    world = len(cuts) - 1
    shares = [
        total_loss(heads.sums(part, part.masks(), *frames), counts, LOSS, STEP, world)
        for part in parts
        for frames in pairwise(cuts)
    ]
    terms = LossTerms(*(torch.stack([share[i] for share in shares]).sum() for i in range(4)), total=torch.tensor(0.0))
    total = torch.stack([share.total for share in shares]).sum() / world  # the engine averages over the ranks
    gradients = torch.autograd.grad(total, tuple(heads.parameters()))
    return terms._replace(total=total), list(gradients)


@pytest.mark.parametrize("micro_batches", [[0, 4], [0, 2, 4], [0, 1, 3, 4]])
@pytest.mark.parametrize("cuts", [[0, 6], [0, 3, 6], [0, 2, 4, 6]])
def test_however_clips_and_frames_are_dealt_out(micro_batches: list[int], cuts: list[int]) -> None:
    heads, case = Heads(), Case.random()
    wanted, wanted_gradients = terms_of(heads, [case], [0, F])
    found, gradients = terms_of(heads, [case.clips(*part) for part in pairwise(micro_batches)], cuts)
    for one, other in zip(found, wanted, strict=True):
        assert one is not None and other is not None and other > 0.01
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
    for gradient, other in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("frames", [7, 8, 12])
def test_padding_changes_nothing(frames: int) -> None:
    heads, case = Heads(), Case.random()
    wanted, wanted_gradients = terms_of(heads, [case], [0, F])
    found, gradients = terms_of(heads, [case.padded(frames, 1e3)], [0, frames])
    for one, other in zip((*found, *gradients), (*wanted, *wanted_gradients), strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert case.counts() == case.padded(frames, 1e3).counts()


def test_clean_frames_carry_no_velocity_loss() -> None:
    heads, case = Heads(), Case.random()
    wanted, _ = terms_of(heads, [case], [0, F])
    for name in ("video", "struct"):
        predicted = getattr(case.predicted, name).clone()
        predicted[getattr(case.sigma, name) == 0] += 50.0
        other = Case(case.batch, case.sigma, case.target, case.predicted._replace(**{name: predicted}))
        found, _ = terms_of(heads, [other], [0, F])
        for one, before in zip(found, wanted, strict=True):
            assert one is not None and before is not None and torch.equal(one, before)


def test_masks_and_counts() -> None:
    sigma = FrameSigma(torch.tensor([[0.0, 0.3, 0.9, 0.2, 0.0]]), torch.tensor([[0.0, 0.0, 0.5, 0.2, 0.0]]))
    valid = torch.tensor([[True, True, True, True, False]])
    flame_valid = torch.ones(1, 5, 4, dtype=torch.bool)
    flame_valid[0, 2, 1:] = False
    masks = loss_masks(sigma, valid, flame_valid, torch.tensor([[True, True, True, True, True]]), 0.6)
    assert masks.video.tolist() == [[False, True, True, True, False]]
    assert masks.struct.tolist() == [[False, False, True, True, False]]
    assert masks.flame.sum(-1).tolist() == [[4, 4, 1, 4, 0]]
    assert masks.lip_items.tolist() == [[True, True, False, True, False]]
    counts = loss_counts(masks, sigma)
    # FLAME: noisy slots 1 + 4, all slots 4 + 4 + 1 + 4. Lip rows: 0 and 3 have a negative, 1 has (frame 3), too.
    assert [count.item() for count in counts] == [3, 2, 5, 13, 3]
    assert all(count.dtype == torch.float32 for count in counts)


def test_stacked_counts_add_up_exactly() -> None:
    large = LossCounts(*(torch.tensor(2.0**24) for _ in range(5)))
    one = LossCounts(*(torch.tensor(1.0) for _ in range(5)))
    found = stack_counts([large, one, one])
    assert found.dtype == torch.float64 and found.tolist() == [2**24 + 2] * 5


def test_frame_errors() -> None:
    predicted, target = torch.zeros(1, 2, 3, 2, 2), torch.zeros(1, 2, 3, 2, 2)
    target[0, 0] = 2.0
    target[0, 1, 0, 0, 0] = 6.0
    assert frame_errors(predicted, target).tolist() == [[4.0, 3.0]]
    assert frame_errors(predicted.bfloat16(), target.bfloat16()).dtype == torch.float32


def test_flame_weight_falls_to_zero() -> None:
    config = LossConfig(flame=0.1, flame_steps=100)
    assert [flame_weight(config, step) for step in (0, 50, 100, 1000)] == [0.1, 0.05, 0.0, 0.0]


def test_weights() -> None:
    one = torch.tensor(1.0)
    sums = LossSums(2 * one, 3 * one, 5 * one, 7 * one, 11 * one)
    counts = LossCounts(*(one for _ in range(5)))
    config = LossConfig(struct=0.5, flame=0.1, flame_steps=10, lip_sync=0.25)
    terms = total_loss(sums, counts, config, step=5, world=4)
    assert [float(term) for term in terms[:4]] == [2, 3, 12, 11]
    assert float(terms.total) == pytest.approx(4 * (2 + 0.5 * 3 + 0.05 * 12 + 0.25 * 11))


def test_terms_that_a_run_lacks_are_none() -> None:
    one = torch.tensor(1.0)
    counts = LossCounts(*(torch.tensor(0.0) for _ in range(5)))
    terms = total_loss(LossSums(0 * one, 0 * one, None, None, None), counts, LossConfig(), 0, 1)
    assert terms.flame is None and terms.lip_sync is None
    assert terms.total == 0  # nothing to count is zero, not NaN
