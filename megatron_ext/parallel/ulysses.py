"""Ulysses sequence parallelism over whole frames (Jacobs et al. 2023, arXiv 2309.14509).

Between attentions a rank holds F/sp frames with all heads; inside attention it holds all frames with N/sp heads. Every
exchange is differentiable, and its backward is the adjoint of the sum of the losses of all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.parallel.grid import ProcessGrid


def frames_to_heads(x: Tensor, grid: ProcessGrid) -> Tensor:
    """[B,F/sp,T,N,K] on every rank -> [B,F,T,N/sp,K]; the identity when sp is 1."""
    return x if grid.sp == 1 else _FramesToHeads.apply(x, grid)


def heads_to_frames(x: Tensor, grid: ProcessGrid) -> Tensor:
    """[B,F,T,N/sp,K] on every rank -> [B,F/sp,T,N,K]; the identity when sp is 1."""
    return x if grid.sp == 1 else _HeadsToFrames.apply(x, grid)


def gather_frames(x: Tensor, grid: ProcessGrid) -> Tensor:
    """[B,F/sp,...] on every rank -> [B,F,...] on all; the backward sums the gradients of all ranks."""
    return x if grid.sp == 1 else _GatherFrames.apply(x, grid)


def shard_frames(x: Tensor, grid: ProcessGrid) -> Tensor:
    """This rank's [B,F/sp,...] of a tensor [B,F,...] that all ranks hold and that carries no gradient."""
    if x.shape[1] % grid.sp:
        raise ValueError(f"{x.shape[1]} frames over {grid.sp} ranks: pad to a multiple first")
    size = x.shape[1] // grid.sp
    return x[:, grid.sp_rank * size : (grid.sp_rank + 1) * size]


# For one clip the frame blocks of all ranks, received one after the other, already are the frames in order: then the
# only copy is the one that brings the slices of each rank together, and nothing is kept twice.


def _split_heads(x: Tensor, grid: ProcessGrid) -> Tensor:
    """The all-to-all of `frames_to_heads`, without gradient."""
    batch, frames, tokens, heads, size = x.shape
    if heads % grid.sp:
        raise ValueError(f"{heads} heads over {grid.sp} ranks: expected a multiple")
    # Contiguous in [destination, B, F, T, N/sp, K]: all_to_all_single sends equal slices of the first dimension.
    send = x.reshape(batch, frames, tokens, grid.sp, heads // grid.sp, size).permute(3, 0, 1, 2, 4, 5).contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=grid.sp_group)
    return received.transpose(0, 1).reshape(batch, grid.sp * frames, tokens, heads // grid.sp, size)


def _split_frames(x: Tensor, grid: ProcessGrid) -> Tensor:
    """The all-to-all of `heads_to_frames`, without gradient."""
    batch, frames, tokens, heads, size = x.shape
    send = x.reshape(batch, grid.sp, frames // grid.sp, tokens, heads, size).transpose(0, 1).contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=grid.sp_group)
    return received.permute(1, 2, 3, 0, 4, 5).reshape(batch, frames // grid.sp, tokens, grid.sp * heads, size)


class _FramesToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: ProcessGrid) -> Tensor:
        ctx.grid = grid
        return _split_heads(x, grid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _split_frames(grad, ctx.grid), None


class _HeadsToFrames(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: ProcessGrid) -> Tensor:
        ctx.grid = grid
        return _split_frames(x, grid)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _split_heads(grad, ctx.grid), None


class _GatherFrames(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: ProcessGrid) -> Tensor:
        ctx.grid = grid
        # Frames first, so that the ranks' parts are whole slices of the result.
        send = x.transpose(0, 1).contiguous()
        full = torch.empty((grid.sp * send.shape[0], *send.shape[1:]), dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(full, send, group=grid.sp_group)
        return full.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        full = grad.clone(memory_format=torch.contiguous_format)  # the incoming gradient is not ours to overwrite
        dist.all_reduce(full, group=ctx.grid.sp_group)
        return shard_frames(full, ctx.grid).contiguous(), None
