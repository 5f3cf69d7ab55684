"""What the backends of attention do around their libraries, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.plans import everything
from torch import Tensor

from dualforce.model.path import ChunkRule
from megatron_ext.kernels.attention import reference
from megatron_ext.kernels.attention.flash import FlashAttention, FlashUnavailable
from megatron_ext.kernels.attention.flex import FlexAttention, _key_blocks

CPU = torch.device("cpu")


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    source = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=source) for shape in shapes]


@pytest.mark.parametrize(
    ("rule", "frames", "tokens"),
    [
        (ChunkRule(2, None, 0), 5, (40, 40)),
        (ChunkRule(1, 2, 1), 6, (70, 70)),
        (ChunkRule(2, None, 0), 5, (60, 4)),
        (ChunkRule(2, 1, 1), 7, (4, 60)),
        (ChunkRule(1, None, 0), 3, (128, 128)),
    ],
)
def test_flex_equals_the_reference(rule: ChunkRule, frames: int, tokens: tuple[int, int]) -> None:
    """Forward only: FlexAttention has no backward on the CPU. fp32 sums over a few hundred keys."""
    plan = rule.plan(range(frames), range(frames))
    q, k, v = tensors((2, frames, tokens[0], 2, 16), *2 * [(2, frames, tokens[1], 2, 16)])
    flex = FlexAttention(CPU, compiled=False)
    out, log_sum = flex.with_log_sum(q, k, v, plan)
    torch.testing.assert_close(out, reference.frame_causal(q, k, v, plan), rtol=0, atol=5e-6)
    first = torch.einsum("bqnk,blnk->bnql", q[:, 0], k[:, : plan.visible[0][-1][1]].flatten(1, 2)) / 4
    torch.testing.assert_close(log_sum[:, :, : tokens[0]], first.logsumexp(-1), rtol=0, atol=5e-6)
    assert len(flex._masks) == 1 and flex.frame_causal(q, k, v, plan) is not None and len(flex._masks) == 1


def test_keys_of_growing_caches_take_few_lengths() -> None:
    """Generation without a window: 400 chunks, a handful of kernels to compile; results as ever."""
    with torch.no_grad():
        lengths = {_key_blocks(128 * blocks) for blocks in range(1, 401)}
    assert len(lengths) <= 32 and max(lengths) <= 1.25 * 400
    assert {_key_blocks(128 * blocks) for blocks in range(1, 401)} == set(range(1, 401))  # training: as they are
    flex, plan = FlexAttention(CPU, compiled=False), everything(2, 11)
    q, k, v = tensors((1, 2, 30, 2, 16), *2 * [(1, 11, 100, 2, 16)])
    with torch.no_grad():
        found = flex.frame_causal(q, k, v, plan)
    torch.testing.assert_close(found, reference.frame_causal(q, k, v, plan), rtol=0, atol=5e-6)


def flash(processors: int, calls: list[tuple[int, ...]]) -> FlashAttention:
    """FlashAttention over plain attention, on a GPU of so many processors; `calls` gets the shapes of q."""

    def plain(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, None]:
        calls.append(tuple(q.shape))
        return reference.attend(q, k, v), None

    made = object.__new__(FlashAttention)
    made._cute, made._processors = SimpleNamespace(flash_attn_func=plain), processors  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize(("processors", "parts"), [(1, 1), (8, 4), (1000, 8)])
def test_queries_over_few_keys_are_cut_into_parts(processors: int, parts: int) -> None:
    q, k, v = (x.double().requires_grad_() for x in tensors((2, 4096, 2, 8), (2, 5, 2, 8), (2, 5, 2, 8)))
    calls: list[tuple[int, ...]] = []
    out = flash(processors, calls).attend(q, k, v)
    assert calls == [(2 * parts, 4096 // parts, 2, 8)]
    wanted = reference.attend(q, k, v)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    weight = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad((out * weight).sum(), (q, k, v)),
        torch.autograd.grad((wanted * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_flash_without_a_gpu_says_so() -> None:
    with pytest.raises(FlashUnavailable, match="needs a CUDA device, not cpu"):
        FlashAttention(CPU)


def test_one_chunk_that_sees_everything_needs_no_lists() -> None:
    assert object.__new__(FlashAttention)._prepare(everything(3, 8), 100, 100, 8) == {}
