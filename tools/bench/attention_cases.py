"""Frame-causal attention with one frame a chunk: ours, FlexAttention, and SDPA with a dense mask.

Legend: L tokens, N heads, K head size. FLOPs of a forward are 4 K N a visible pair, of a backward 2.5 times as many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from dualforce.model.path import ChunkRule
from megatron_ext.kernels.attention import reference
from megatron_ext.kernels.attention.flex import FlexAttention
from megatron_ext.kernels.attention.plan import FramePlan
from tools.bench.gate import ATTENTION_BOUND, Tensors, agree
from tools.bench.measure import Setting, peak_bytes, rates, settled_bytes
from tools.bench.rates import median_ms

RULE = ChunkRule(frames_per_chunk=1, window=None, sink=0)
BACKWARD = 2.5  # forwards that a backward costs
CHECKED_FRAMES, CHECKED_HEADS = 6, 2  # of the small shape: whole frames, so its tiles are of the same kinds
MOST_DENSE_FRAMES = 41  # a dense mask of 98x1024 tokens is 10 GB, and 20 more in bf16

Attend = Callable[..., Tensor]  # q, k, v [1,F,T,N,K] and a plan -> [1,F,T,N,K]


class Case(NamedTuple):
    """Queries of one stream, keys of the same or of another."""

    name: str
    frames: int
    query_tokens: int  # a frame
    key_tokens: int
    heads: int
    size: int  # of a head

    def plan(self) -> FramePlan:
        return RULE.plan(range(self.frames), range(self.frames))

    def small(self) -> Case:
        """The same with few frames and heads."""
        return self._replace(frames=min(self.frames, CHECKED_FRAMES), heads=min(self.heads, CHECKED_HEADS))

    def tensors(self, device: torch.device) -> Tensors:
        """q, k, v [1,F,T,N,K] in bf16."""
        source = torch.Generator(device).manual_seed(0)
        tokens = {"q": self.query_tokens, "k": self.key_tokens, "v": self.key_tokens}
        return {
            name: torch.randn(
                1, self.frames, count, self.heads, self.size, generator=source, device=device, dtype=torch.bfloat16
            )
            for name, count in tokens.items()
        }


class DenseMask:
    """SDPA with a mask of booleans [Lq,Lk], kept for the plan it was last asked for."""

    def __init__(self) -> None:
        self._made: tuple[FramePlan, Tensor] | None = None

    def frame_causal(self, q: Tensor, k: Tensor, v: Tensor, plan: FramePlan) -> Tensor:
        """q [B,Fq,Tq,N,K], k and v [B,Fk,Tk,N,K] -> [B,Fq,Tq,N,K]."""
        if self._made is None or self._made[0] is not plan:
            self._made = None  # free it before the next is made
            self._made = plan, dense_mask(plan, q.shape[2], k.shape[1], k.shape[2], q.device)
        mask, size = self._made[1], q.shape[1:3]
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION if q.is_cuda else SDPBackend.MATH):
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).unflatten(1, size)


def dense_mask(plan: FramePlan, query_tokens: int, key_frames: int, key_tokens: int, device: torch.device) -> Tensor:
    """Which keys every query sees, bool [Lq,Lk]."""
    sink, first, last = (torch.tensor(bound, device=device)[:, None] for bound in plan.bounds)
    key = torch.arange(key_frames, device=device)
    frames = (key < sink) | ((key >= first) & (key < last))
    return frames.repeat_interleave(query_tokens, 0).repeat_interleave(key_tokens, 1)


def rows(setting: Setting) -> list[dict[str, Any]]:
    """All shapes; only F = 21 when the setting is quick."""
    found: list[dict[str, Any]] = []
    for frames in (21,) if setting.quick else (21, 41, 98):
        found += _compared(Case(f"{frames}x1024", frames, 1024, 1024, 12, 128), setting)
    alone = (
        Case("21x1024", 21, 1024, 1024, 8, 64),
        Case("21x880", 21, 880, 880, 12, 128),
        Case("21x1024 sees 4", 21, 1024, 4, 12, 128),
        Case("21x4 sees 1024", 21, 4, 1024, 12, 64),
    )
    return found + [_row(case, "ours", setting.ours.frame_causal, setting) for case in alone]


def _compared(case: Case, setting: Setting) -> list[dict[str, Any]]:
    """A row a method, with how many times as long as ours it takes."""
    found = [_row(case, name, attend, setting) for name, attend in _methods(case, setting)]
    for row in found:
        row["x ours"] = row["fwd+bwd ms"] / found[0]["fwd+bwd ms"]
    return found


def _methods(case: Case, setting: Setting) -> Iterator[tuple[str, Attend]]:
    """One at a time, so that what one keeps is gone before the next is measured."""
    yield "ours", setting.ours.frame_causal
    torch.compiler.reset()  # a function is compiled for few shapes, then run eagerly: dense, and out of memory
    yield "FlexAttention", FlexAttention(setting.device).frame_causal
    if case.frames <= MOST_DENSE_FRAMES:
        yield "SDPA, dense mask", DenseMask().frame_causal


def _row(case: Case, name: str, attend: Attend, setting: Setting) -> dict[str, Any]:
    """Checked, then timed. The forward is that of training: it keeps what its backward needs. Where the sides have
    different numbers of tokens (the bridge) there is little to compute, and a call may last as long as its launches."""
    check(f"{name}, {case.name} H{case.heads} D{case.size}", attend, case.small(), setting.device)
    before = settled_bytes()
    plan = case.plan()
    leaves = [x.requires_grad_() for x in case.tensors(setting.device).values()]
    above = torch.randn_like(leaves[0])

    def forward() -> Tensor:
        return attend(*leaves, plan)

    def both() -> Any:
        return torch.autograd.grad(forward(), leaves, above)

    row: dict[str, Any] = {"shape": case.name, "H": case.heads, "D": case.size, "kernel": name}
    row |= {"fwd ms": median_ms([forward]), "fwd+bwd ms": median_ms([both])}
    if case.query_tokens == case.key_tokens:
        flops = 4.0 * plan.pairs(case.query_tokens, case.key_tokens) * case.size * case.heads
        row["fwd TF/s"] = rates("fwd", flops, row["fwd ms"], setting)["fwd"]
        row |= rates("fwd+bwd TF/s", (1 + BACKWARD) * flops, row["fwd+bwd ms"], setting)
    return row | {"peak MB": (peak_bytes(both) - before) / 1e6}


def check(kernel: str, attend: Attend, case: Case, device: torch.device) -> None:
    """Refuse an attention that disagrees with the reference, which computes each frame from visible keys alone."""
    plan = case.plan()

    def call(leaves: Tensors) -> tuple[Tensor]:
        return (attend(leaves["q"], leaves["k"], leaves["v"], plan),)

    def exact(leaves: Tensors) -> tuple[Tensor]:
        return (reference.frame_causal(leaves["q"], leaves["k"], leaves["v"], plan),)

    agree(kernel, call, exact, case.tensors(device), ("out",), ATTENTION_BOUND)
