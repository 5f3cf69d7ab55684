"""Large tensors on the CPU whose memory is used again when they are gone.

A batch of clips passes through several buffers of its size every step. The C library gives pieces beyond 32 MB back to
the system at once, and the faults of new pages then take several times as long as the arithmetic on them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from data_shards.rooms import Rooms

SMALLEST = 2**20  # bytes; the C library keeps less by itself
_ROOMS = Rooms(most_free=2**29)


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A contiguous tensor on the CPU with any content, as `torch.empty` makes it. From any thread."""
    count = math.prod(shape)
    if count * dtype.itemsize < SMALLEST:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    return _ROOMS.take(count * dtype.itemsize).view(dtype)[:count].view(tuple(shape))


def empty_like(x: Tensor) -> Tensor:
    """The same of the shape, dtype and device of `x`; only on the CPU is memory used again."""
    return empty(x.shape, x.dtype) if x.device.type == "cpu" else torch.empty_like(x)
