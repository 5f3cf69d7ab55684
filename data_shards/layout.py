"""How the tensors of a clip lie in its safetensors member: one header, which all clips of a set share as a rule.

The manifest holds the headers (`layouts`), and a member must begin with one of them, byte for byte. A header is
therefore parsed and checked once, when the set is opened, and no clip can say anything of its own about its bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from xxhash import xxh3_64_intdigest

from data_shards.files import parse_json
from data_shards.schema import (
    MAX_CLIP_BYTES,
    TENSOR_FIELDS,
    TIME_FIELDS,
    Form,
    ShardError,
    at,
    check_form,
    shown,
)

MAX_HEADER_BYTES = 2**14  # eight tensors take less than 1 KiB
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "BOOL": "bool", "U8": "uint8",
           "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}  # fmt: skip
_ITEM_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "bool": 1, "uint8": 1, "int8": 1, "int16": 2,
              "int32": 4, "int64": 8}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One tensor: `size` bytes from `offset`, which counts from the end of the header; `frames` checksums (F, or 1 for
    a tensor without time) from word `word` of the clip's row on, each of `stride` bytes. `strides` are in numbers of
    `item` bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    frames: int
    stride: int
    word: int
    item: int
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """`header` is the beginning of the member, its length included; `data` bytes of tensors follow, without gap.
    `parts` are in the order in which they lie there; `words` is the length of a row, of which word 0 is the record's,
    and the others are those of the tensors in the order of TENSOR_FIELDS."""

    header: bytes
    data: int
    parts: tuple[Part, ...]
    words: int

    @property
    def size(self) -> int:
        """Bytes of the member."""
        return len(self.header) + self.data

    @property
    def text(self) -> str:
        """The header as the manifest holds it."""
        return self.header[8:].decode("ascii")

    @cached_property
    def frames(self) -> int:
        """F."""
        return next(part.frames for part in self.parts if part.name == "video")

    @property
    def tokens(self) -> int:
        """E; 0 without text."""
        return next((part.shape[0] for part in self.parts if part.name == "text"), 0)


def header_text(payload: bytes | bytearray, origin: str) -> str:
    """The JSON text at the beginning of a safetensors file; ShardError if it is none."""
    size = struct.unpack("<Q", payload[:8])[0] if len(payload) >= 8 else 0
    if not 2 <= size <= min(MAX_HEADER_BYTES, len(payload) - 8):
        raise ShardError(
            f"{origin}: header of {size} bytes: expected 2 to {MAX_HEADER_BYTES} of {len(payload)} (a safetensors file)"
        )
    return payload[8 : 8 + size].decode("ascii", "backslashreplace")


def parse_layout(text: Any, extractors: Mapping[str, Mapping[str, Any]], place: str) -> Layout:
    """The layout that a header describes. Raises ShardError, with `place` before the field, unless it is a safetensors
    header of the tensors of a clip (`check_form`), which fill a member within the limits without gap or overlap."""
    if not isinstance(text, str) or not 2 <= len(text) <= MAX_HEADER_BYTES or not text.isascii():
        value = f"{len(text)} characters" if isinstance(text, str) else shown(text)
        raise ShardError(f"{place}: {value}: expected the header of a safetensors file, of 2 to {MAX_HEADER_BYTES}")
    document = parse_json(text.encode(), place)
    document.pop("__metadata__", None)
    for name in document:
        if name not in TENSOR_FIELDS:
            raise at(place, name, "unknown tensor", f"one of {', '.join(TENSOR_FIELDS)}")
    spans = {name: _span(document[name], f"{place}: {name}") for name in TENSOR_FIELDS if name in document}
    end = 0
    for name, (form, start, stop) in sorted(spans.items(), key=lambda item: item[1][1]):
        if start != end or start % _ITEM_SIZE[form.dtype]:
            raise at(
                place, name, f"data_offsets from {start}", f"{end}, in sequence, a multiple of the size of a number"
            )
        end = stop
    header = struct.pack("<Q", len(text)) + text.encode()
    if len(header) + end > MAX_CLIP_BYTES:
        raise ShardError(f"{place}: {len(header) + end} bytes: expected at most {MAX_CLIP_BYTES} of a clip")
    check_form({name: form for name, (form, _, _) in spans.items()}, place, extractors)
    parts, word = [], 1
    for name, (form, start, stop) in spans.items():
        frames = form.shape[0] if name in TIME_FIELDS else 1
        stride = (stop - start) // frames
        strides = tuple(math.prod(form.shape[number + 1 :]) for number in range(len(form.shape)))
        item = _ITEM_SIZE[form.dtype]
        parts.append(Part(name, form.dtype, form.shape, start, stop - start, frames, stride, word, item, strides))
        word += frames
    return Layout(header, end, tuple(sorted(parts, key=lambda part: part.offset)), word)


def checksums(data: bytes | memoryview, parts: int) -> list[int]:
    """xxh3_64 of each of `parts` equal parts of `data`."""
    stride, data = len(data) // parts, memoryview(data)  # slices of a view are not copies
    return [xxh3_64_intdigest(data[start : start + stride]) for start in range(0, stride * parts, stride)]


def row_of(record: bytes | bytearray, payload: bytes | bytearray, layout: Layout) -> list[int]:
    """The checksums of a clip: of its JSON member, then of every frame of every tensor in the order of the layout."""
    row = [xxh3_64_intdigest(record)]
    data = memoryview(payload)[len(layout.header) :]
    for part in sorted(layout.parts, key=lambda part: part.word):
        row += checksums(data[part.offset : part.offset + part.size], part.frames)
    return row


def pack_row(row: Sequence[int]) -> bytes:
    """A row as it lies in a file of checksums."""
    return struct.pack(f"<{len(row)}Q", *row)


def _span(value: Any, place: str) -> tuple[Form, int, int]:
    value = value if isinstance(value, dict) else {}
    dtype, shape = value.get("dtype"), _whole_numbers(value.get("shape"))
    span = _whole_numbers(value.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ShardError(f"{place}: dtype {shown(dtype)}: expected one of {', '.join(_DTYPES)}")
    if not 1 <= len(shape) <= 8 or 0 in shape:
        raise ShardError(f"{place}: shape {shown(value.get('shape'))}: expected 1 to 8 lengths of at least 1")
    if len(span) != 2 or span[0] >= span[1]:
        raise ShardError(f"{place}: data_offsets {shown(value.get('data_offsets'))}: expected a range of bytes")
    size, needed = span[1] - span[0], _ITEM_SIZE[_DTYPES[dtype]] * math.prod(shape)
    if size != needed:
        raise ShardError(f"{place}: {size} bytes: expected {needed}, of {dtype} {shape}")
    return Form(_DTYPES[dtype], tuple(shape)), span[0], span[1]


def _whole_numbers(value: Any) -> list[int]:
    """`value` if it is a list of whole numbers, else an empty list."""
    fits = isinstance(value, list) and all(type(number) is int and 0 <= number < 2**40 for number in value)
    return value if fits else []
