"""Frame-causal attention through FlexAttention, for GPUs without flash-attn-4 (compute capability 8.x among them).

Legend: B batch, F frames, T tokens a frame, N heads, K head size, L = F * T.

The block mask is made from the block lists of the plan (FlexAttention's format has room for every block in each row: an
index per 128 x 128 pairs), and the rule for partial tiles reads three bounds per query token, so that one compiled
kernel serves every plan of one size.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from megatron_ext.kernels.attention import reference
from megatron_ext.kernels.attention.block_lists import BLOCK, BlockList, block_lists, token_bounds
from megatron_ext.kernels.attention.plan import FramePlan, check_frames

# Each new pair of lengths is a kernel to compile. A run has few; beyond this many something is wrong, and FlexAttention
# would go on without a word in a form that builds the whole matrix of scores.
MOST_SHAPES = 64


class FlexAttention:
    """Attention by torch's FlexAttention on one device; `compiled` False runs it eagerly (dense: tests only)."""

    def __init__(self, device: torch.device, compiled: bool = True) -> None:
        self._device = device
        run: Any = flex_attention
        self._flex: Any = torch.compile(run, dynamic=False, fullgraph=True) if compiled else run
        self._masks: WeakKeyDictionary[FramePlan, dict[tuple[int, ...], BlockMask]] = WeakKeyDictionary()

    def frame_causal(self, q: Tensor, k: Tensor, v: Tensor, plan: FramePlan) -> Tensor:
        """q [B,Fq,Tq,N,K], k and v [B,Fk,Tk,N,K] -> [B,Fq,Tq,N,K]; see the reference."""
        return self.with_log_sum(q, k, v, plan)[0]

    def with_log_sum(self, q: Tensor, k: Tensor, v: Tensor, plan: FramePlan) -> tuple[Tensor, Tensor]:
        """The same, and the log-sum-exp of every row's scaled scores, fp32 [B,N,Fq*Tq]."""
        check_frames(q, k, plan)
        length = q.shape[1] * q.shape[2]
        blocks = (_blocks(length), _key_blocks(k.shape[1] * k.shape[2]))
        sizes = (q.shape[2], k.shape[2], *blocks)
        known = self._masks.setdefault(plan, {})
        if sizes not in known:
            known[sizes] = self._mask(plan, *sizes)
        rooms = (blocks[0], blocks[1], blocks[1])
        padded = (_padded(x.flatten(1, 2), n).transpose(1, 2) for x, n in zip((q, k, v), rooms, strict=True))
        with torch._dynamo.config.patch(recompile_limit=MOST_SHAPES):
            out, log_sum = self._flex(*padded, block_mask=known[sizes], return_lse=True)
        return out[:, :, :length].transpose(1, 2).unflatten(1, q.shape[1:3]), log_sum[:, :, :length]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Full attention: no mask, so SDPA's own kernels serve."""
        return reference.attend(q, k, v)

    def _mask(self, plan: FramePlan, query_tokens: int, key_tokens: int, queries: int, keys: int) -> BlockMask:
        """For `queries` and `keys` blocks, of which those beyond the plan's frames are padding that nobody sees."""
        forward, _ = block_lists(plan, query_tokens, key_tokens, plan.key_frames)
        bounds = token_bounds(plan, query_tokens, key_tokens)
        # Rows padded at the end see key 0: a row that sees nothing would be 0/0. They are cut off.
        extra = torch.tensor([[1], [0], [0]], dtype=torch.int32, device="cpu")
        extra = extra.expand(3, queries * BLOCK - bounds.shape[1])
        sink, first, last = torch.cat((bounds, extra), dim=1).to(self._device)

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return ((key < last[query]) & (key >= first[query])) | (key < sink[query])

        partial, full = (self._dense(part, keys) for part in forward)
        lengths = (queries * BLOCK, keys * BLOCK)
        return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=lengths)

    def _dense(self, part: BlockList, blocks: int) -> tuple[Tensor, Tensor]:
        """[1,1,R] and [1,1,R,blocks]: FlexAttention wants room for every block in a row."""
        index = pad(part.blocks, (0, blocks - part.blocks.shape[1]))
        return part.counts.to(self._device)[None, None], index.contiguous().to(self._device)[None, None]


def _blocks(length: int) -> int:
    return -(-length // BLOCK)


def _key_blocks(length: int) -> int:
    """Blocks for so many keys. In generation their number grows chunk by chunk: rounded up to one of four in an octave,
    it is one of few. Padding costs memory only, since no list names it."""
    blocks = _blocks(length)
    if torch.is_grad_enabled():
        return blocks
    step = max(1, 1 << max(0, blocks.bit_length() - 3))
    return -(-blocks // step) * step


def _padded(x: Tensor, blocks: int) -> Tensor:
    """[B,L,N,K] with L brought to so many blocks."""
    missing = blocks * BLOCK - x.shape[1]
    return pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
