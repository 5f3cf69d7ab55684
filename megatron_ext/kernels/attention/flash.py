"""Frame-causal attention through flash-attn-4 with block lists: no mask of any size, no tile that nobody sees.

Legend: B batch, F frames, T tokens a frame, N heads, K head size, L = F * T.

Tiles that all their rows see run without a mask. Only tiles at the edge of what a row may see (tokens a frame not a
multiple of 128, few tokens a frame) evaluate a rule, from three bounds per query token. Key blocks list their query
blocks from the last one down: so one row of indices serves all of them, and it is no slower than the other way
(docs/performance.md). In the backward flash-attn-4 adds up dq with atomic operations: dq may differ in its last bits
from run to run; the outputs, dk and dv do not.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from megatron_ext.kernels.attention.block_lists import BLOCK, BlockList, BlockLists, block_lists, token_bounds
from megatron_ext.kernels.attention.plan import FramePlan, check_frames

HEAD_DIMS = (64, 128)  # tested; others are not offered
DTYPES = (torch.bfloat16, torch.float16)


class FlashUnavailable(RuntimeError):
    """flash-attn-4 cannot run here; the message says why in one line."""


class FlashAttention:
    """Attention by flash-attn-4 on one device. Raises FlashUnavailable where it cannot run."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise FlashUnavailable(f"flash-attn-4 needs a CUDA device, not {device.type}")
        major, minor = torch.cuda.get_device_capability(device)
        if major != 9:
            raise FlashUnavailable(f"flash-attn-4 is used on compute capability 9.x, this device has {major}.{minor}")
        try:
            self._cute: Any = importlib.import_module("flash_attn.cute")
            sparsity = importlib.import_module("flash_attn.cute.block_sparsity")
        except ImportError as error:
            raise FlashUnavailable(f"flash-attn-4 does not import ({error}); install the extra `fused`") from None
        self._lists: Any = sparsity.BlockSparseTensorsTorch
        self._device = device
        self._processors = torch.cuda.get_device_properties(device).multi_processor_count
        # Arguments by plan and sizes. They live as long as the plan: a CUDA graph knows the lists by address only.
        self._prepared: WeakKeyDictionary[FramePlan, dict[tuple[int, int, int], dict[str, Any]]] = WeakKeyDictionary()
        self._seen_until, self._seen_between = _mask_rules()

    def frame_causal(self, q: Tensor, k: Tensor, v: Tensor, plan: FramePlan) -> Tensor:
        """q [B,Fq,Tq,N,K], k and v [B,Fk,Tk,N,K] -> [B,Fq,Tq,N,K]; see the reference."""
        out: Tensor = self._cute.flash_attn_func(*_flat(q, k, v), **self._arguments(q, k, plan))[0]
        return out.unflatten(1, q.shape[1:3])

    def with_log_sum(self, q: Tensor, k: Tensor, v: Tensor, plan: FramePlan) -> tuple[Tensor, Tensor]:
        """The same, and the log-sum-exp of every row's scaled scores, fp32 [B,N,Fq*Tq]."""
        out, log_sum = self._cute.flash_attn_func(*_flat(q, k, v), return_lse=True, **self._arguments(q, k, plan))
        return out.unflatten(1, q.shape[1:3]), log_sum

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Full attention: q [B,Lq,N,K], k and v [B,Lk,N,K] -> [B,Lq,N,K]."""
        parts = self._query_parts(q, k)
        if parts == 1:
            out: Tensor = self._cute.flash_attn_func(q, k, v)[0]
            return out
        # The backward walks all queries of a key block one after the other. Few keys leave most of the GPU idle, so
        # each part of the queries has keys of its own, whose gradients are added up.
        keys, values = (x[:, None].expand(-1, parts, -1, -1, -1).flatten(0, 1) for x in (k, v))
        out = self._cute.flash_attn_func(q.unflatten(1, (parts, -1)).flatten(0, 1), keys, values)[0]
        return out.unflatten(0, (-1, parts)).flatten(1, 2)

    def _query_parts(self, q: Tensor, k: Tensor) -> int:
        """Into how many parts the queries are cut: as few as give the GPU two rounds of work, of 512 or more each."""
        programs = q.shape[0] * q.shape[2] * -(-k.shape[1] // BLOCK)
        length, parts = q.shape[1], 1
        while programs * parts < 2 * self._processors and length % (2 * parts) == 0 and length // (2 * parts) >= 512:
            parts *= 2
        return parts

    def _arguments(self, q: Tensor, k: Tensor, plan: FramePlan) -> dict[str, Any]:
        """The block lists and the rule of a plan at these sizes, made once."""
        check_frames(q, k, plan)
        sizes = (q.shape[2], k.shape[2], k.shape[1])
        known = self._prepared.setdefault(plan, {})
        if sizes not in known:
            known[sizes] = self._prepare(plan, *sizes)
        return known[sizes]

    def _prepare(self, plan: FramePlan, query_tokens: int, key_tokens: int, key_frames: int) -> dict[str, Any]:
        if plan.visible == (((0, key_frames),),):
            return {}
        forward, backward = block_lists(plan, query_tokens, key_tokens, key_frames)
        arguments: dict[str, Any] = {
            "block_sparse_tensors": self._on_device(forward),
            "block_sparse_tensors_bwd": self._on_device(backward),
        }
        if int(forward.partial.counts.sum()):
            bounds = token_bounds(plan, query_tokens, key_tokens)
            whole = not bool(bounds[:2].any())
            sink, first, last = bounds.to(self._device)
            arguments["mask_mod"] = self._seen_until if whole else self._seen_between
            arguments["aux_tensors"] = [last] if whole else [last, first, sink]
        return arguments

    def _on_device(self, lists: BlockLists) -> Any:
        partial, full = (self._moved(part) for part in lists)
        return self._lists(*partial, *full, block_size=(BLOCK, BLOCK))

    def _moved(self, part: BlockList) -> tuple[Tensor, Tensor]:
        """[1,1,R] and [1,1,R,most]; a shared row of indices stays one row."""
        count, index = part
        shared = index.stride(0) == 0
        row = index[:1].to(self._device)
        moved = row.expand(index.shape) if shared else index.to(self._device)
        return count.to(self._device)[None, None], moved[None, None]


def _flat(*tensors: Tensor) -> list[Tensor]:
    """[B,F,T,N,K] -> [B,L,N,K]."""
    return [x.flatten(1, 2) for x in tensors]


def _mask_rules() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The rules for partial tiles in flash-attn-4's language: key < last, and key < sink or first <= key < last, with
    the bounds of the query token read from tensors. Two, since each read costs every element of the tile."""
    cutlass: Any = importlib.import_module("cutlass")
    cute: Any = importlib.import_module("cutlass.cute")
    utils: Any = importlib.import_module("flash_attn.cute.utils")

    @cute.jit
    def seen_until(batch, head, query, key, lengths, bounds):  # type: ignore[no-untyped-def]
        return key < utils.scalar_to_ssa(bounds[0][query[0]], cutlass.Int32)

    @cute.jit
    def seen_between(batch, head, query, key, lengths, bounds):  # type: ignore[no-untyped-def]
        last = utils.scalar_to_ssa(bounds[0][query[0]], cutlass.Int32)
        first = utils.scalar_to_ssa(bounds[1][query[0]], cutlass.Int32)
        sink = utils.scalar_to_ssa(bounds[2][query[0]], cutlass.Int32)
        return ((key < last) & (key >= first)) | (key < sink)

    return seen_until, seen_between
