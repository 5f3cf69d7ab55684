"""Frame-causal attention on the GPU against float64, output by output and gradient by gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from helpers.plans import everything
from torch import Tensor

from dualforce.model.path import ChunkRule
from megatron_ext.kernels.attention.flash import FlashAttention, FlashUnavailable
from megatron_ext.kernels.attention.flex import FlexAttention
from megatron_ext.kernels.attention.plan import FramePlan

pytestmark = pytest.mark.gpu


class Case(NamedTuple):
    frames: int
    query_tokens: int
    key_tokens: int
    heads: int
    size: int
    rule: ChunkRule
    batch: int = 1

    def plan(self) -> FramePlan:
        return self.rule.plan(range(self.frames), range(self.frames))


CASES = [
    Case(5, 256, 256, 2, 128, ChunkRule(1, None, 0)),
    Case(9, 128, 128, 3, 64, ChunkRule(2, None, 0), 2),
    Case(7, 880, 880, 2, 128, ChunkRule(2, None, 0)),
    Case(9, 100, 100, 2, 64, ChunkRule(2, None, 0)),
    Case(11, 256, 256, 2, 128, ChunkRule(2, 2, 1)),
    Case(13, 130, 130, 1, 128, ChunkRule(3, 2, 2)),
    Case(21, 4, 4, 12, 64, ChunkRule(2, None, 0)),
    Case(41, 4, 4, 2, 64, ChunkRule(2, 3, 1), 2),
    Case(9, 256, 4, 2, 128, ChunkRule(2, None, 0)),  # video queries, structure keys
    Case(41, 128, 4, 2, 128, ChunkRule(2, 3, 1)),
    Case(9, 4, 256, 2, 64, ChunkRule(2, None, 0)),  # structure queries, video keys
    Case(9, 4, 130, 2, 64, ChunkRule(2, 2, 1), 2),
    Case(3, 1, 1, 1, 64, ChunkRule(1, None, 0)),  # rows that see one key
]


def name(case: Case) -> str:
    tokens = f"{case.batch}x{case.frames}x{case.query_tokens}-{case.key_tokens}"
    return f"{tokens}-n{case.heads}k{case.size}-{tuple(case.rule)}"


@pytest.fixture(scope="module", params=["flash", "flex"])
def backend(request: pytest.FixtureRequest) -> Any:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "flex":
        return FlexAttention(torch.device("cuda"))
    try:
        return FlashAttention(torch.device("cuda"))
    except FlashUnavailable as error:
        pytest.skip(str(error))


def tensors(case: Case, seed: int = 0) -> list[Tensor]:
    source = torch.Generator("cuda").manual_seed(seed)
    shapes = [(case.batch, case.frames, t, case.heads, case.size) for t in (case.query_tokens, *2 * [case.key_tokens])]
    made = [torch.randn(shape, generator=source, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    return [x.requires_grad_() for x in made]


def dense(q: Tensor, k: Tensor, v: Tensor, plan: FramePlan) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp) by a softmax over an explicit mask, in the dtype of q."""
    sink, first, last = (torch.tensor(x, device=q.device)[:, None] for x in plan.bounds)
    key = torch.arange(k.shape[1], device=q.device)
    mask = (key < sink) | ((key >= first) & (key < last))
    mask = mask.repeat_interleave(q.shape[2], 0).repeat_interleave(k.shape[2], 1)
    flat_q, flat_k, flat_v = (x.flatten(1, 2) for x in (q, k, v))
    scores = torch.einsum("bqnk,blnk->bnql", flat_q, flat_k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask, -torch.inf)
    out = torch.einsum("bnql,blnk->bqnk", scores.softmax(-1), flat_v)
    return out.unflatten(1, q.shape[1:3]), scores.logsumexp(-1)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


@pytest.mark.parametrize("case", CASES, ids=name)
def test_against_float64(backend: Any, case: Case) -> None:
    """bf16 keeps 8 bits: inputs are exact in it, the probabilities and the result are rounded once each, so the
    relative error of a sum of many terms stays near 2^-9 = 2e-3; gradients pass through two more rounded products."""
    q, k, v = tensors(case)
    plan = case.plan()
    weight = torch.randn_like(q)
    out, log_sum = backend.with_log_sum(q, k, v, plan)
    out = backend.frame_causal(q, k, v, plan)
    found = [out, *torch.autograd.grad((out * weight).sum(), (q, k, v))]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted_out, wanted_sum = dense(*wide, plan)
    wanted = [wanted_out, *torch.autograd.grad((wanted_out * weight.double()).sum(), wide)]
    assert relative(log_sum.reshape(wanted_sum.shape), wanted_sum) < 1e-3
    for label, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert torch.isfinite(a).all(), label
        if b.norm() < 1e-6 * len(b.flatten()) ** 0.5:  # rows of one key: dq and dk are zero but for rounding
            assert a.double().norm() <= 2**-7 * weight.double().norm(), label
        else:
            assert relative(a, b) < 6e-3, label


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[4], CASES[8], CASES[10]], ids=name)
def test_repeats_are_bit_identical_but_for_dq(backend: Any, case: Case) -> None:
    """flash-attn-4 adds up dq with atomic operations (see flash.py): equal to rounding, not to the bit."""
    q, k, v = tensors(case)
    plan, weight = case.plan(), torch.randn_like(q)
    runs = []
    for _ in range(3):
        out = backend.frame_causal(q, k, v, plan)
        runs.append([out, *torch.autograd.grad((out * weight).sum(), (v, k, q))])
    for other in runs[1:]:
        for a, b in zip(runs[0][:3], other[:3], strict=True):
            assert torch.equal(a, b)
        assert relative(other[3], runs[0][3].double()) < 1e-3


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[5], CASES[9], CASES[11]], ids=name)
def test_later_frames_do_not_change_a_bit(backend: Any, case: Case) -> None:
    q, k, v = (x.detach() for x in tensors(case))
    plan = case.plan()
    before = backend.frame_causal(q, k, v, plan)
    first = 1 + case.rule.frames_per_chunk  # the first frame of chunk 2
    k[:, first:], v[:, first:] = 3.0, -2.0
    after = backend.frame_causal(q, k, v, plan)
    assert torch.equal(before[:, :first], after[:, :first])
    assert not torch.equal(before[:, first:], after[:, first:])


def test_packed_inputs_need_no_copy(backend: Any) -> None:
    """q, k and v as slices of one tensor, as a packed projection leaves them."""
    case = CASES[2]
    packed = torch.stack([x.detach() for x in tensors(case)], dim=3)
    views = [x.squeeze(3) for x in packed.split(1, dim=3)]
    assert not views[0].is_contiguous()
    whole = [x.contiguous() for x in views]
    assert torch.equal(backend.frame_causal(*views, case.plan()), backend.frame_causal(*whole, case.plan()))


def test_cached_queries_see_everything(backend: Any) -> None:
    """What generation runs: one chunk against committed and own frames, in a buffer that is longer."""
    source = torch.Generator("cuda").manual_seed(1)
    buffer = torch.randn(2, 2, 12, 200, 2, 128, generator=source, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(2, 3, 200, 2, 128, generator=source, device="cuda", dtype=torch.bfloat16)
    k, v = buffer[0, :, :8], buffer[1, :, :8]
    found = backend.frame_causal(q, k, v, everything(3, 8))
    wanted, _ = dense(*(x.double() for x in (q, k, v)), everything(3, 8))
    assert relative(found, wanted) < 6e-3


@pytest.mark.parametrize("keys", [1, 512])
def test_full_attention_of_many_queries_to_few_keys(backend: Any, keys: int) -> None:
    """Text: the queries are cut into parts, and the gradients of the keys added up (bounds as above)."""
    source = torch.Generator("cuda").manual_seed(2)
    shapes = ((1, 8192, 4, 128), (1, keys, 4, 128), (1, keys, 4, 128))
    q, k, v = (torch.randn(s, generator=source, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in shapes)
    weight = torch.randn_like(q)
    out = backend.attend(q, k, v)
    found = [out, *torch.autograd.grad((out * weight).sum(), (q, k, v))]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("bqnk,blnk->bnql", wide[0], wide[1]) / 128**0.5
    exact = torch.einsum("bnql,blnk->bqnk", scores.softmax(-1), wide[2])
    wanted = [exact, *torch.autograd.grad((exact * weight.double()).sum(), wide)]
    for label, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        if keys == 1 and label in ("dq", "dk"):  # one key: the probabilities are 1 whatever the scores
            assert a.double().norm() <= 2**-7 * weight.double().norm(), label
        else:
            assert relative(a, b) < 6e-3, label
