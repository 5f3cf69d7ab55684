"""Micro-batches from one process to another: all tensors of a step in one piece of shared memory, copied once.

One piece, because every tensor that goes by itself costs the trainer a connection to the process that made it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualforce.types import ClipBatch

ALIGNMENT = 64  # bytes: no tensor shares a cache line with its neighbour


class Handover(NamedTuple):
    """`memory` (uint8, shared), and per micro-batch the fields of a ClipBatch with a Place for each tensor."""

    memory: Tensor
    batches: list[tuple[Any, ...]]


class Place(NamedTuple):
    """Where a tensor lies in the memory, in bytes."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def hand_over(batches: list[ClipBatch]) -> Handover:
    """Copy the tensors of `batches` (CPU) into new shared memory."""
    rows, tensors, size = [], [], 0
    for batch in batches:
        row: list[Any] = []
        for value in batch:
            if isinstance(value, Tensor):
                row.append(Place(size, value.dtype, tuple(value.shape)))
                tensors.append((row[-1], value))
                size += -(-value.nbytes // ALIGNMENT) * ALIGNMENT
            else:
                row.append(value)
        rows.append(tuple(row))
    # As torch's own collate does: share_memory_ would fill a second memory first.
    memory = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size, device="cpu"))
    for place, tensor in tensors:
        _at(memory, place).copy_(tensor)
    return Handover(memory, rows)


def taken(handover: Handover) -> list[ClipBatch]:
    """The micro-batches; their tensors lie in the shared memory, which lives as long as one of them does."""
    return [
        ClipBatch._make([_at(handover.memory, value) if isinstance(value, Place) else value for value in row])
        for row in handover.batches
    ]


def _at(memory: Tensor, place: Place) -> Tensor:
    size = math.prod(place.shape) * place.dtype.itemsize
    return memory[place.start : place.start + size].view(place.dtype).view(place.shape)
