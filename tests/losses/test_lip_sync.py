"""Lip sync against a slow loop in float64 (model reference 8.4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from helpers.tiny_model import randomise
from torch import Tensor
from torch.nn import functional

from dualforce.config import LipSyncConfig
from dualforce.losses.lip_sync import LipSums, LipSyncHead, lip_items, lip_rows

B, F, C, SIZE, CA = 3, 7, 4, 16, 5
CONFIG = LipSyncConfig(dim=8)


def identity(x: Tensor) -> Tensor:
    return x


def head(config: LipSyncConfig = CONFIG) -> LipSyncHead:
    made = randomise(LipSyncHead(C, CA, config))
    with torch.no_grad():
        made.log_tau.fill_(math.log(config.tau))
    return made


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """denoised, audio, sigma, items; clip 1 has two items that are neighbours, clip 2 just one."""
    source = torch.Generator().manual_seed(seed)
    items = torch.ones(B, F, dtype=torch.bool)
    items[0, 3] = False
    items[1], items[2] = torch.arange(F) // 2 == 1, torch.arange(F) == 4
    sigma = torch.rand(B, F, generator=source) * 0.6
    return (
        torch.randn(B, F, C, SIZE, SIZE, generator=source),
        torch.randn(B, F, 12, CA, generator=source),
        sigma,
        items,
    )


def call(
    lip: LipSyncHead, denoised: Tensor, audio: Tensor, sigma: Tensor, items: Tensor,
    gather: Callable[[Tensor], Tensor] = identity,
) -> LipSums:  # fmt: skip
    return lip(denoised, audio, sigma, items, 0, gather)


def embeddings(lip: LipSyncHead, denoised: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of mouths and sounds, [B,F,D] float64."""
    # Rows 36..60 and columns 18..46 of 64, of a latent of 16: rows 9..15 and columns 4.5..11.5, rounded outwards.
    crop = denoised[..., 9:15, 4:12].flatten(0, 1)
    mouth = lip.mouth(functional.adaptive_avg_pool2d(crop, (4, 6)).flatten(1))
    sound = lip.sound(audio.flatten(0, 1).transpose(1, 2))
    mouth, sound = ((x / x.norm(dim=-1, keepdim=True)).detach().double().view(B, F, -1) for x in (mouth, sound))
    return mouth, sound


def slow(lip: LipSyncHead, denoised: Tensor, audio: Tensor, sigma: Tensor, items: Tensor) -> tuple[float, float, int]:
    mouth, sound = embeddings(lip, denoised, audio)
    loss = hits = 0.0
    rows = 0
    for b in range(B):
        for j in range(F):
            others = [i for i in range(F) if items[b, i] and abs(i - j) >= 2]
            if not items[b, j] or not others:
                continue
            rows += 1
            for query, keys in ((mouth, sound), (sound, mouth)):
                scores = [float(query[b, j] @ keys[b, i]) / CONFIG.tau for i in [j, *others]]
                loss += 0.5 * float(1 - sigma[b, j]) * (math.log(sum(math.exp(s) for s in scores)) - scores[0])
                hits += 0.5 * (scores[0] == max(scores))
    return loss, hits, rows


@pytest.mark.parametrize("seed", range(3))
def test_against_a_loop(seed: int) -> None:
    lip, given = head(), inputs(seed)
    found, (loss, hits, rows) = call(lip, *given), slow(lip, *given)
    assert found.loss.item() == pytest.approx(loss, rel=1e-5) and loss > 0.1
    assert found.hits.item() == hits
    assert found.rows.item() == rows == 6  # clip 0 but for one frame; clips 1 and 2 have no negatives


def test_rows_need_a_negative_two_frames_away() -> None:
    *_, items = inputs()
    assert torch.equal(lip_rows(items), torch.stack((items[0], torch.zeros(F).bool(), torch.zeros(F).bool())))
    pair = torch.tensor([[True, False, True, False], [True, True, False, False], [True, True, True, False]])
    assert lip_rows(pair).tolist() == [[True, False, True, False], [False] * 4, [True, False, True, False]]


def test_items() -> None:
    sigma = torch.tensor([[0.0, 0.6, 0.61, 0.1, 0.1]])
    voiced = torch.tensor([[True, True, True, False, True]])
    valid = torch.tensor([[True, True, True, True, False]])
    assert lip_items(sigma, voiced, valid, 0.6).tolist() == [[True, True, False, False, False]]


def test_neighbours_other_clips_and_left_out_frames_are_no_negatives() -> None:
    lip = head()
    denoised, audio, sigma, items = inputs()
    before = call(lip, denoised, audio, sigma, items)
    for place in ((0, 3), (1, 0), (1, 2), (2, 4)):  # left out, or a row without negatives
        changed = denoised.clone()
        changed[place] += 3.0
        assert torch.equal(call(lip, changed, audio, sigma, items).loss, before.loss), place
    only = torch.zeros_like(items)
    only[0, :3] = True  # frames 0 and 2 are each other's negatives, 1 has none
    before = call(lip, denoised, audio, sigma, only)
    assert before.rows == 2
    changed = audio.clone()
    changed[0, 1] += 3.0
    assert torch.equal(call(lip, denoised, changed, sigma, only).loss, before.loss)
    changed[0, 2] += 3.0
    assert not torch.equal(call(lip, denoised, changed, sigma, only).loss, before.loss)


def test_only_the_mouth_is_read() -> None:
    lip = head()
    denoised, audio, sigma, items = inputs()
    denoised.requires_grad_()
    call(lip, denoised, audio, sigma, items).loss.backward()
    assert denoised.grad is not None
    touched = denoised.grad.abs().sum((0, 1, 2)) > 0
    wanted = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    wanted[9:15, 4:12] = True
    assert torch.equal(touched, wanted)


@pytest.mark.parametrize("size", [2, 4, 8, 32])
def test_any_latent_size_has_a_mouth(size: int) -> None:
    _, audio, sigma, items = inputs()
    assert torch.isfinite(call(head(), torch.randn(B, F, C, size, size), audio, sigma, items).loss)


def test_temperature_is_learned_and_bounded() -> None:
    lip, given = head(), inputs()
    call(lip, *given).loss.backward()
    assert lip.log_tau.grad is not None and lip.log_tau.grad.abs() > 1e-3
    losses = []
    for tau in (0.02, 0.01, 0.001):
        with torch.no_grad():
            lip.log_tau.fill_(math.log(tau))
        losses.append(call(lip, *given).loss.item())
    assert losses[1] == pytest.approx(losses[2], rel=1e-5) and losses[0] != pytest.approx(losses[1], rel=1e-2)


def test_noisy_rows_count_less() -> None:
    lip = head()
    denoised, audio, sigma, items = inputs()
    full = call(lip, denoised, audio, torch.zeros_like(sigma), items)
    half = call(lip, denoised, audio, torch.full_like(sigma, 0.5), items)
    assert half.loss.item() == pytest.approx(0.5 * full.loss.item()) and half.rows == full.rows


def test_no_items_is_zero_with_a_gradient_for_every_parameter() -> None:
    """Every rank runs every module in every step: a missing term is zero, not absent."""
    lip = head()
    denoised, audio, sigma, items = inputs()
    sums = call(lip, denoised, audio, sigma, torch.zeros_like(items))
    assert sums.loss == 0 and sums.rows == 0 and sums.hits == 0
    sums.loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() and not p.grad.any() for p in lip.parameters())


@pytest.mark.parametrize("cuts", [[0, 7], [0, 3, 7], [0, 1, 4, 6, 7]])
def test_frames_dealt_to_ranks_add_up(cuts: list[int]) -> None:
    """Local queries against gathered keys: sums and gradients are those of one process."""
    lip = head()
    denoised, audio, sigma, items = inputs()
    seen: list[Tensor] = []

    def record(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    whole = call(lip, denoised, audio, sigma, items, record)
    wanted = torch.autograd.grad(whole.loss, tuple(lip.parameters()), retain_graph=True)
    parts = [
        lip(denoised[:, a:b], audio[:, a:b], sigma[:, a:b], items, a, lambda _: seen[0]) for a, b in pairwise(cuts)
    ]
    for name in ("loss", "hits", "rows"):
        total = torch.stack([getattr(part, name) for part in parts]).sum()
        torch.testing.assert_close(total, getattr(whole, name), rtol=1e-6, atol=0)
    found = torch.autograd.grad(torch.stack([part.loss for part in parts]).sum(), tuple(lip.parameters()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
