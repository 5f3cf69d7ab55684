"""What the groups of the kernel benchmark share: the setting, device time without launches, peak memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from megatron_ext.kernels.kernel_set import KernelSet
from tools.bench.rates import DATASHEET_TFLOPS, copy_ms, median_ms

Prepare = Callable[[], Callable[[], object]]  # makes the inputs of a call on the current stream, gives the call
ROUNDS = 4  # a captured graph holds every call this often: what a graph costs to start is spread over them


class Setting(NamedTuple):
    """What every group is given."""

    device: torch.device
    ours: KernelSet
    matmul: float  # TFLOP/s of this device in this process
    quick: bool


def rates(name: str, flops: float, ms: float, setting: Setting) -> dict[str, float]:
    """TFLOP/s under `name` of `flops` operations in `ms`, and the shares of the measured and the datasheet rate."""
    rate = flops / ms / 1e9
    return {name: rate, "of matmul": rate / setting.matmul, f"of {DATASHEET_TFLOPS:.0f}": rate / DATASHEET_TFLOPS}


def kernel_ms(preparations: Sequence[Prepare]) -> float:
    """Milliseconds on the device of one call, the calls in turn, all captured in one CUDA graph: of a call of tens of
    microseconds the host's part would be the longer one.

    Inputs are prepared on the stream of the capture, as a backward runs on the stream of its forward. All results stay
    alive, so that no call writes where the one before wrote and finds its lines in the cache.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls = [prepare() for prepare in preparations]
        for call in calls:
            call()  # compiles: nothing may be loaded during a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [call() for call in calls * ROUNDS]
    return median_ms([graph.replay]) / len(kept)


def floor_ms(size: int, sets: int) -> float:
    """Milliseconds of a copy that reads and writes `size` bytes in all: timed as kernels are, and by plain calls, the
    faster of both, so that the way of timing cannot flatter a kernel."""

    def prepare() -> Callable[[], Any]:
        source = torch.empty(size // 2, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return min(kernel_ms([prepare] * sets), copy_ms(size))


def settled_bytes() -> int:
    """Bytes of the tensors that are alive on the device, once what nobody holds is gone."""
    gc.collect()
    torch.cuda.empty_cache()
    return int(torch.cuda.memory_allocated())


def peak_bytes(call: Callable[[], object]) -> int:
    """The most bytes of tensors alive during a call, those from before included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated())
