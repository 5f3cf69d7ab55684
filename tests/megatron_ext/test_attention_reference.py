"""The reference attention against a dense-mask softmax in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dualforce.model.path import ChunkRule
from megatron_ext.kernels.attention.plan import FramePlan
from megatron_ext.kernels.attention.reference import attend, frame_causal


def dense(q: Tensor, k: Tensor, v: Tensor, frames_see: Tensor) -> Tensor:
    """Softmax attention in float64 with an explicit mask; frames_see [Fq,Fk] bool."""
    tokens_q, tokens_k = q.shape[2], k.shape[2]
    mask = frames_see.repeat_interleave(tokens_q, 0).repeat_interleave(tokens_k, 1)
    flat_q, flat_k, flat_v = (x.double().flatten(1, 2) for x in (q, k, v))
    scores = torch.einsum("bqnk,blnk->bnql", flat_q, flat_k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bnql,blnk->bqnk", weights, flat_v).unflatten(1, q.shape[1:3])


def sees(queries: list[int], keys: list[int], n: int, window: int | None, sink: int) -> Tensor:
    """The mask from its definition, chunk by chunk."""
    label = [0] + [1 + i // n for i in range(max(queries + keys))]
    rows = []
    for query in queries:
        back = [label[query] - label[key] for key in keys]  # how many chunks ago
        near = [ago >= 0 and (window is None or ago < window) for ago in back]
        rows.append([a or (ago >= 0 and label[key] < sink) for a, ago, key in zip(near, back, keys, strict=True)])
    return torch.tensor(rows)


def tensors(shape_q: tuple[int, ...], shape_k: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=source, dtype=torch.float64).to(dtype) for s in (shape_q, shape_k, shape_k)]


CASES = [
    # frames, frames per chunk, window, sink
    (1, 1, None, 0),
    (5, 1, None, 0),
    (5, 2, None, 0),
    (6, 2, None, 0),  # the last chunk is short
    (8, 3, None, 0),
    (9, 2, 1, 0),
    (9, 2, 2, 0),
    (9, 2, 2, 1),
    (10, 3, 1, 2),
    (11, 2, 3, 1),
]


@pytest.mark.parametrize(("frames", "n", "window", "sink"), CASES)
@pytest.mark.parametrize("tokens", [(6, 6), (6, 4), (4, 6)], ids=["self", "to-video", "to-struct"])
def test_equals_dense_softmax(frames: int, n: int, window: int | None, sink: int, tokens: tuple[int, int]) -> None:
    q, k, v = tensors((2, frames, tokens[0], 3, 8), (2, frames, tokens[1], 3, 8), torch.float64)
    for x in (q, k, v):
        x.requires_grad_()
    everything = list(range(frames))
    out = frame_causal(q, k, v, ChunkRule(n, window, sink).plan(everything, everything))
    wanted = dense(q, k, v, sees(everything, everything, n, window, sink))
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    weight = torch.randn_like(out)
    for got, want in zip(
        torch.autograd.grad((out * weight).sum(), (q, k, v)),
        torch.autograd.grad((wanted * weight).sum(), (q, k, v)),
        strict=True,
    ):
        assert want.abs().max() > 0.01
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_narrow_types_stay_near_float64(dtype: torch.dtype, atol: float) -> None:
    q, k, v = tensors((2, 7, 6, 3, 16), (2, 7, 4, 3, 16), dtype)
    everything = list(range(7))
    out = frame_causal(q, k, v, ChunkRule(2, 2, 1).plan(everything, everything))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), dense(q, k, v, sees(everything, everything, 2, 2, 1)), rtol=0, atol=atol)


def test_some_queries_against_cached_and_own_keys() -> None:
    """What a cached path runs: the keys of some earlier frames, in any gap, then the queries' own."""
    queries, keys = [7, 8, 9, 10], [0, 3, 4, 5, 6, 7, 8, 9, 10]
    q, k, v = tensors((2, 4, 5, 2, 4), (2, 9, 3, 2, 4), torch.float64)
    out = frame_causal(q, k, v, ChunkRule(2, 2, 1).plan(queries, keys))
    torch.testing.assert_close(out, dense(q, k, v, sees(queries, keys, 2, 2, 1)), rtol=0, atol=1e-12)


def test_later_keys_do_not_change_a_bit() -> None:
    q, k, v = tensors((1, 7, 6, 2, 8), (1, 7, 6, 2, 8), torch.float32)
    plan = ChunkRule(2, None, 0).plan(range(7), range(7))
    before = frame_causal(q, k, v, plan)
    k[:, 5:], v[:, 5:] = torch.nan, torch.inf
    after = frame_causal(q, k, v, plan)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.isfinite(after[:, 5:]).any()


@pytest.mark.parametrize(
    ("runs", "visible"),
    [
        (((0, 1), (2, 3)), (((0, 1),), ((0, 3),))),  # frame 1 is left out
        (((0, 1), (1, 3)), (((0, 1),), ())),  # a run that sees nothing
        (((0, 1),), (((0, 1),), ((0, 2),))),  # keys without queries
        (((0, 1), (1, 2)), (((0, 2),), ((0, 1),))),  # the last key moves back
        (((0, 1), (1, 2)), (((1, 2),), ((0, 2),))),  # the first key moves back
        (((0, 1),), (((1, 2), (3, 4)),)),  # a sink that does not begin at 0
        (((0, 1),), (((0, 2), (2, 4)),)),  # two ranges that are one
    ],
)
def test_a_plan_that_no_kernel_can_run_is_an_error(runs: Any, visible: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        FramePlan(runs, visible)


@pytest.mark.parametrize(("queries", "keys"), [(3, 2), (2, 3), (4, 3)])
def test_tensors_that_do_not_fit_the_plan_are_an_error(queries: int, keys: int) -> None:
    q, k, v = tensors((1, queries, 2, 1, 4), (1, keys, 2, 1, 4), torch.float32)
    with pytest.raises(ValueError, match=f"{queries} query and {keys} key frames"):
        frame_causal(q, k, v, ChunkRule(1, None, 0).plan(range(3), range(3)))


def test_full_attention() -> None:
    q, k, v = tensors((2, 5, 3, 8), (2, 7, 3, 8), torch.float64)
    scores = torch.einsum("bqnk,blnk->bnql", q, k) / 8**0.5
    torch.testing.assert_close(attend(q, k, v), torch.einsum("bnql,blnk->bqnk", scores.softmax(-1), v))
