"""What is read of a clip and where it lies in memory: worked out once for all clips of a layout that are read alike,
because what Python works out anew for every clip takes as long as the checksums of its bytes."""

from __future__ import annotations

from typing import NamedTuple

from data_shards.index import rounded_up
from data_shards.layout import Layout, Part
from data_shards.schema import REPEATED, TIME_FIELDS


class Piece(NamedTuple):
    """Room for the first frames of a tensor, from byte `start` of the clip's room on; `shape` is that of the tensor,
    `first` its first number, counted in numbers of its dtype. Bytes `starts[i]` to `ends[i]` of the room have checksum
    `words.start` + i of the clip's row."""

    part: Part
    start: int
    size: int
    shape: tuple[int, ...]
    first: int
    starts: range
    ends: range
    words: slice


class Plan(NamedTuple):
    """`size` bytes of room for `pieces`. `numbers` are bytes that hold numbers of one dtype; the two halves of
    `repeated` are equal where the slots that latent frame 0 repeats are."""

    size: int
    pieces: tuple[Piece, ...]
    numbers: tuple[tuple[slice, str], ...]
    repeated: tuple[tuple[slice, slice], ...]


def whole_plan(layout: Layout) -> Plan:
    """Of a clip that is read as it lies in its member."""
    return _plan([(part, part.frames, part.offset) for part in layout.parts])


def prefix_plan(layout: Layout, frames: int, beyond: int) -> Plan:
    """Of the first `frames` latent frames, of the audio `beyond` more."""
    chosen, size = [], 0
    for part in layout.parts:
        count = part.frames if part.name not in TIME_FIELDS else frames + beyond if part.name == "audio" else frames
        # Larger numbers come first as a rule, so that there is nothing to fill up.
        start = rounded_up(size, part.item)
        chosen.append((part, count, start))
        size = start + count * part.stride
    return _plan(chosen)


def _plan(chosen: list[tuple[Part, int, int]]) -> Plan:
    pieces = []
    for part, frames, start in chosen:
        shape, size = (frames, *part.shape[1:]) if part.name in TIME_FIELDS else part.shape, frames * part.stride
        starts = range(start, start + size, part.stride)
        ends, words = range(start + part.stride, start + size + 1, part.stride), slice(part.word, part.word + frames)
        pieces.append(Piece(part, start, size, shape, start // part.item, starts, ends, words))
    return Plan(
        size=max(piece.start + piece.size for piece in pieces),
        pieces=tuple(pieces),
        numbers=_numbers(pieces),
        repeated=tuple(_repeated(piece) for piece in pieces if piece.part.name in REPEATED),
    )


def _numbers(pieces: list[Piece]) -> tuple[tuple[slice, str], ...]:
    """Tensors of a dtype that lie next to each other are looked at as one."""
    found: list[tuple[slice, str]] = []
    for piece in pieces:
        start, end, dtype = piece.start, piece.start + piece.size, piece.part.dtype
        if found and found[-1][1] == dtype and found[-1][0].stop == start:
            start = found.pop()[0].start
        found.append((slice(start, end), dtype))
    return tuple(found)


def _repeated(piece: Piece) -> tuple[slice, slice]:
    """Equal slots are those that are equal to the next one."""
    slot = piece.part.strides[1] * piece.part.item
    end = piece.start + REPEATED[piece.part.name] * slot
    return slice(piece.start, end - slot), slice(piece.start + slot, end)
