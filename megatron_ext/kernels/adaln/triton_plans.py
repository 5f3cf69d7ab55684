"""How the Triton kernels of the adaptive LayerNorm are launched: functions of widths and sizes, measured on an H100.

Equal shapes therefore give the same order of sums, and the same bits, on every machine.
"""

from __future__ import annotations

from typing import NamedTuple

PROCESSORS = 132  # of an H100 or H200; another number costs speed, never a result
SHARED_BYTES = 160 * 1024  # of a processor's 227 KB, for tiles on their way


class Plan(NamedTuple):
    """How a kernel is launched; a function of the width and the dtype alone."""

    rows: int  # tokens a step of the loop
    block: int  # lanes along D
    tail: int  # further lanes along D (norms only)
    warps: int
    stages: int  # steps of the loop in flight, the current one included
    programs: int  # that fill the machine once; slabs are cut to make a whole number of such waves
    evict: str = ""


def norm_forward_plan(width: int, itemsize: int, streams: int) -> Plan:
    """For `adaln` (1 wide tensor read) and `adaln_residual` (2). A token's row stays in registers; the next rows travel
    to shared memory meanwhile. Few warps a program and several programs a processor, so that some load while others
    compute; and several waves of them, as a short slab costs one reading of its modulation and a long one idle
    processors at the end."""
    block, tail = _lanes(width)
    rows, step = max(1, min(16, 1024 // power_of_two(width))), width * itemsize * streams
    if width > 6144:
        return Plan(rows, block, tail, 16, _stages(rows * step, 3), PROCESSORS)
    if width > 2048 and streams == 1:
        return Plan(1, block, tail, 4, _stages(step, 3), PROCESSORS * 12)
    if width > 2048:
        return Plan(1, block, tail, 8, _stages(step, 4), PROCESSORS * 8)
    warps = 1 if width <= 1536 else 2  # one warp for a row as long as its values fit into registers
    programs = PROCESSORS * (60 if streams == 1 else 32) // warps
    return Plan(rows, block, tail, warps, _stages(rows * step, 3), programs)


def norm_backward_plan(width: int, itemsize: int, streams: int) -> Plan:
    """For 2 (`adaln`) to 4 (`adaln_residual`) wide tensors read. Two or three sums of D values more in registers, and
    as few slabs as fill the machine: every slab writes its sums."""
    block, tail = _lanes(width)
    rows, step = max(1, min(16, 1024 // power_of_two(width))), width * itemsize * streams
    if width > 6144:
        return Plan(rows, block, tail, 32, _stages(rows * step, 3), PROCESSORS)
    if width > 2048:
        return Plan(1, block, tail, 4 if streams == 2 else 8, _stages(step, 4 if streams == 2 else 3), PROCESSORS)
    if width > 1024:
        block, tail = power_of_two(width), 0
    warps = power_of_two(min(4, max(1, (block + tail) // 384)))
    programs = PROCESSORS * max(1, (8 if streams == 2 else 12) // warps)
    return Plan(rows, block, tail, warps, _stages(rows * step, 4 if streams == 2 else 3), programs)


def gate_forward_plan(width: int, itemsize: int) -> Plan:
    """One tile a program: nothing is kept between tiles but the gate."""
    block = _columns(width)
    rows = max(1, min(64, 8192 // (block * itemsize)))
    return Plan(rows, block, 0, 4, 1, 1 << 30)


def gate_backward_plan(width: int, itemsize: int) -> Plan:
    """Long slabs, because each writes its sum, cut along D into blocks."""
    block = _columns(width)
    rows = max(1, min(64, 16384 // (block * itemsize)))
    return Plan(rows, block, 0, 4, 1, PROCESSORS * 4)


def power_of_two(value: int) -> int:
    """The next power of two."""
    return 1 << (value - 1).bit_length()


def _lanes(width: int) -> tuple[int, int]:
    """A row as one power of two, or as two where that is fewer lanes: 1536 = 1024 + 512."""
    whole = power_of_two(width)
    tail = power_of_two(max(1, width - whole // 2))
    return (whole // 2, tail) if width > 128 and tail < whole // 2 else (whole, 0)


def _columns(width: int) -> int:
    """Columns a program takes where nothing is summed along D: a power of two that divides D, if a wide one does."""
    for block in (1024, 512, 256, 128):
        if width % block == 0:
            return block
    return min(1024, power_of_two(width))


def _stages(step_bytes: int, most: int) -> int:
    """At most `most` steps in flight, fewer where those that wait would not fit in shared memory."""
    return max(1, min(most, 1 + SHARED_BYTES // step_bytes))


def slabs(frames: int, tokens: int, rows: int, programs: int) -> tuple[int, int]:
    """(slabs a frame, tokens a slab): the longest slabs that leave little of the machine idle in the last wave."""
    tiles = -(-tokens // rows)
    splits = 1
    for waves in (1, 2, 3, 4):
        splits = waves * programs // frames
        if splits * frames >= 0.94 * waves * programs:
            break
    each = -(-tiles // min(max(splits, 1), tiles))
    return -(-tiles // each), each * rows
