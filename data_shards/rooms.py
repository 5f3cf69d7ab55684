"""Memory for clips that is used again when their tensors are gone.

New memory costs a fault of every page, which takes as long as copying the page; the allocator gives large pieces back
to the system as soon as they are free, so without this every clip would pay.
"""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_STEP = 2**12  # sizes are whole pages
MOST_FREE = 2**26  # bytes that wait for the next clip


class Rooms:
    """Lends pieces of memory; one that is lent comes back by itself when the last tensor in it is gone.

    At most `most_free` bytes are kept beside those that are lent; pieces of other sizes make room for the one that came
    back last. Safe to use from several threads.
    """

    def __init__(self, most_free: int = MOST_FREE) -> None:
        self._most = most_free
        self._free: dict[int, list[NDArray[np.uint8]]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (Rooms, (self._most,))  # another process has memory of its own

    def take(self, size: int) -> Tensor:
        """At least `size` bytes, [B] uint8, with any content."""
        size = -(-max(size, 1) // _STEP) * _STEP
        try:
            whole = self._free[size].pop()
        except (KeyError, IndexError):
            whole = np.empty(size, np.uint8)
        lent = whole[:]  # tensors hold this view and not the piece itself, so that its end is theirs
        weakref.finalize(lent, self._give_back, whole).atexit = False
        return torch.from_numpy(lent)

    def _give_back(self, whole: NDArray[np.uint8]) -> None:
        # Called wherever the last tensor goes, in any thread: nothing here may wait for a lock. The sum may therefore
        # be a piece off.
        if whole.nbytes > self._most:
            return
        free = self._free.copy()  # at once: pieces may come back while a garbage collection interrupts this
        waiting = sum(size * len(pieces) for size, pieces in free.items())
        for size, pieces in free.items():
            while size != whole.nbytes and waiting + whole.nbytes > self._most and pieces:
                with suppress(IndexError):  # another thread took the last one
                    pieces.pop()
                waiting -= size
        if waiting + whole.nbytes <= self._most:
            self._free.setdefault(whole.nbytes, []).append(whole)
