"""The safetensors member of a clip: its header read strictly, its tensors placed and checksummed, its bytes decoded."""

from __future__ import annotations

import math
import struct
import zlib
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from data_shards.files import parse_json
from data_shards.index import ITEM_SIZE, ClipEntry
from data_shards.schema import TENSOR_FIELDS, TIME_FIELDS, ShardError, fail, shown

MAX_HEADER_BYTES = 2**14  # eight tensors take less than 1 KiB
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "BOOL": "bool", "U8": "uint8",
           "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}  # fmt: skip


class _Listed(NamedTuple):
    """One tensor of a header; `offset` counts from the start of the file."""

    offset: int
    size: int
    dtype: str
    shape: list[int]


def tensor_table(payload: bytes, origin: str) -> dict[str, dict[str, Any]]:
    """{name: {"offset", "dtype", "shape", "crc32"}} of a safetensors file: what an index records of its tensors, with
    offsets from the start of the file. ShardError for a header that is not one of such a file."""
    return {
        name: {
            "offset": listed.offset,
            "dtype": listed.dtype,
            "shape": listed.shape,
            "crc32": checksums(
                memoryview(payload)[listed.offset : listed.offset + listed.size],
                listed.shape[0] if name in TIME_FIELDS else 1,
            ),
        }
        for name, listed in _read_header(payload, origin).items()
    }


def checksums(data: bytes | memoryview, parts: int) -> str:
    """crc32 of each of `parts` equal parts of `data`, 8 hexadecimal digits each."""
    stride, data = len(data) // parts, memoryview(data)  # slices of a view are not copies
    return "".join(f"{zlib.crc32(data[i * stride : (i + 1) * stride]):08x}" for i in range(parts))


def decode_all(payload: bytes, entry: ClipEntry, origin: str) -> dict[str, Tensor]:
    """All tensors of the member; its header must say what the index says."""
    found = _read_header(payload, f"{origin}: sample {entry.key!r}: {entry.payload.name}")
    for name in TENSOR_FIELDS:
        _check_agreement(name, found.get(name), entry, origin)
    try:
        return load_tensors(payload)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        # The first line only: messages of the parser may go on with the bytes that they met.
        reason = shown(str(error).splitlines()[0], raw=True)
        raise fail(origin, entry.key, entry.payload.name, reason, "a safetensors file") from None


def _read_header(payload: bytes, origin: str) -> dict[str, _Listed]:
    size = struct.unpack("<Q", payload[:8])[0] if len(payload) >= 8 else 0
    if not 2 <= size <= min(MAX_HEADER_BYTES, len(payload) - 8):
        raise ShardError(
            f"{origin}: header of {size} bytes: expected 2 to {MAX_HEADER_BYTES} of {len(payload)} (a safetensors file)"
        )
    header = parse_json(payload[8 : 8 + size], origin)
    header.pop("__metadata__", None)
    for name in header:
        if name not in TENSOR_FIELDS:
            raise ShardError(f"{origin}: {shown(name)}: unknown tensor: expected one of {', '.join(TENSOR_FIELDS)}")
    start = 8 + size
    return {name: _listed(value, start, len(payload), f"{origin}: {name}") for name, value in header.items()}


def _listed(value: Any, start: int, end: int, origin: str) -> _Listed:
    value = value if isinstance(value, dict) else {}
    dtype, shape = value.get("dtype"), _whole_numbers(value.get("shape"))
    span = _whole_numbers(value.get("data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ShardError(f"{origin}: dtype {shown(dtype)}: expected one of {', '.join(_DTYPES)}")
    if not 1 <= len(shape) <= 8 or 0 in shape:
        raise ShardError(f"{origin}: shape {shown(value.get('shape'))}: expected 1 to 8 lengths of at least 1")
    if len(span) != 2 or not span[0] < span[1] <= end - start:
        given = shown(value.get("data_offsets"))
        raise ShardError(f"{origin}: data_offsets {given}: expected a range within {end - start} bytes")
    size, needed = span[1] - span[0], ITEM_SIZE[_DTYPES[dtype]] * math.prod(shape)
    if size != needed:
        raise ShardError(f"{origin}: {size} bytes: expected {needed}, of {dtype} {shape}")
    return _Listed(start + span[0], size, _DTYPES[dtype], shape)


def _whole_numbers(value: Any) -> list[int]:
    """`value` if it is a list of whole numbers, else an empty list."""
    fits = isinstance(value, list) and all(type(number) is int and 0 <= number < 2**40 for number in value)
    return value if fits else []


def _check_agreement(name: str, found: _Listed | None, entry: ClipEntry, origin: str) -> None:
    listed = entry.tensors.get(name)
    if listed is None and found is None:
        return
    if listed is None or found is None:
        expected = "no such tensor, as in the index" if listed is None else "a tensor, as in the index"
        raise fail(origin, entry.key, name, "present" if listed is None else "absent", expected)
    offset = entry.payload.offset + found.offset
    pairs: tuple[tuple[str, object, object], ...] = (
        ("dtype", found.dtype, listed.dtype),
        ("shape", found.shape, list(listed.shape)),
        ("offset", offset, listed.offset),
    )
    for what, real, stated in pairs:
        if real != stated:
            raise fail(origin, entry.key, name, f"{what} {real}", f"{stated}, as in the index")
