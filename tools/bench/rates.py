"""The two ceilings of a GPU, measured in the run that is compared with them, and how calls are timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch

DATASHEET_TFLOPS = 989.0  # dense bf16 of an H100 or H200 SXM; never the sparse figure


def median_ms(calls: Sequence[Callable[[], object]], seconds: float = 0.3, warmup: int = 3) -> float:
    """Median milliseconds of one call on the device; calls take turns, so that their inputs are not in the cache."""
    for i in range(max(warmup, len(calls))):
        calls[i % len(calls)]()
    torch.cuda.synchronize()
    times: list[float] = []
    count = 8
    while sum(times) < 1000 * seconds and len(times) < 400:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for i in range(count):
            calls[i % len(calls)]()
            marks[i + 1].record()
        torch.cuda.synchronize()
        times += [a.elapsed_time(b) for a, b in pairwise(marks)]
    return statistics.median(times)


def matmul_tflops(size: int = 8192, seconds: float = 0.02) -> float:
    """TFLOP/s of a bf16 product of two square matrices of random numbers: in a short burst, before the card lowers its
    clocks; with more seconds, what it sustains."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    torch.cuda.synchronize()
    time.sleep(0.2)
    return float(2 * size**3 / median_ms([lambda: a @ b], seconds) / 1e9)


def copy_ms(size: int) -> float:
    """Milliseconds of a copy on the device that reads and writes `size` bytes in all."""
    # Several pairs: at tens of megabytes one pair would partly stay in the cache.
    pairs = [
        tuple(torch.empty(size // 2, dtype=torch.uint8, device="cuda") for _ in range(2))
        for _ in range(max(1, min(4, (1 << 30) // max(size, 1) + 1)))
    ]
    return median_ms([partial(target.copy_, source) for source, target in pairs])
