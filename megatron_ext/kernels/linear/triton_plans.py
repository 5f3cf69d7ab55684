"""How the Triton kernels of linear layers are launched: functions of rows, width and dtype, by plain rules.

Equal shapes are therefore cut alike on every machine, and summed in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

from megatron_ext.kernels.adaln.triton_plans import PROCESSORS, power_of_two

FEW_ROWS = 128  # one program walks through so many sooner than a second launch could add up what several had found
COLUMNS, FEW_COLUMNS = 256, 64  # in bf16, what a warp reads at 16 bytes a thread; one cache line, for more programs
LINES = 256  # most rows of a tile


class Plan(NamedTuple):
    """How a matrix [rows,D] is cut: `splits` slabs of `slab` consecutive rows, each walked through in tiles."""

    lines: int  # rows of a tile
    block: int  # columns of a tile, and of the program that walks
    splits: int
    slab: int
    warps: int
    stages: int  # steps of the walk in flight, the current one included


def sum_plan(rows: int, width: int, itemsize: int) -> Plan:
    """Tiles of 8 KB, 64 bytes a thread. Each program writes its sums, so there are no more of them than run at once:
    with 56 registers a thread, eight a processor."""
    return _plan(rows, width, 8192 // itemsize, 1, PROCESSORS * 8)


def gelu_plan(rows: int, width: int, itemsize: int) -> Plan:
    """Tiles of 4 KB of each of two tensors, the next ones on their way to shared memory during the arithmetic. Several
    waves of programs: what the sums cost is little beside four passes over the tensors, and a short last wave leaves
    less of the machine idle."""
    return _plan(rows, width, 4096 // itemsize, 3, PROCESSORS * 32)


def final_plan(splits: int) -> Plan:
    """For the sums [splits,D] of all slabs: one tile as a rule, as narrow as a cache line, to be many programs."""
    return Plan(min(LINES, power_of_two(splits)), 32, 1, splits, 8, 1)


def _plan(rows: int, width: int, tile: int, stages: int, programs: int) -> Plan:
    few = rows <= FEW_ROWS
    block = min(FEW_COLUMNS if few else COLUMNS, power_of_two(width))
    lines = min(LINES, tile // block)
    splits = 1 if few else min(-(-rows // lines), max(1, programs // -(-width // block)))
    # A slab may end within a tile: what is masked is not read, and equal slabs keep all programs busy to the end.
    slab = -(-rows // splits)
    return Plan(lines, block, -(-rows // slab), slab, 4, stages)
