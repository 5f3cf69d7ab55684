"""Columns of numbers as one safetensors document: any tool reads them, and this one knows every byte of the header.

The header is a function of names, types and lengths alone, so a document is compared with the header that it must have
instead of parsed: nothing in a stranger's document is believed.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import ShardError

Column = NDArray[Any]
Form = tuple[str, tuple[int, ...]]  # "U8", "U32" or "U64"; lengths
HEADER_BYTES = 1024
_TYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("<u1"), "U32": np.dtype("<u4"), "U64": np.dtype("<u8")}


def header_of(forms: Mapping[str, Form]) -> bytes:
    """The first bytes of a document with these columns, in this order: larger types first, so that all are aligned."""
    entries, end = {}, 0
    for name, (kind, shape) in forms.items():
        start, end = end, end + math.prod(shape) * _TYPES[kind].itemsize
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(HEADER_BYTES - 8)  # of one size, whatever the lengths are
    return struct.pack("<Q", len(text)) + text


def size_of(forms: Mapping[str, Form]) -> int:
    """Bytes of a document with these columns."""
    return HEADER_BYTES + sum(math.prod(shape) * _TYPES[kind].itemsize for kind, shape in forms.values())


def encode_columns(forms: Mapping[str, Form], columns: Mapping[str, Any]) -> bytes:
    """The document; `columns` has an array, or what makes one, for every name of `forms`."""
    parts = [header_of(forms)]
    for name, (kind, shape) in forms.items():
        parts.append(np.asarray(columns[name], dtype=_TYPES[kind]).reshape(shape).tobytes())
    return b"".join(parts)


def decode_columns(data: bytes, forms: Mapping[str, Form], origin: str, what: str) -> dict[str, Column]:
    """Views of `data`, not copies; ShardError for another header or size than that of `what`."""
    header, expected = header_of(forms), size_of(forms)
    if len(data) != expected:
        raise ShardError(f"{origin}: {len(data)} bytes: expected {expected}, those of {what}")
    if not data.startswith(header):
        raise ShardError(f"{origin}: another header: expected that of {what}")
    found, offset = {}, len(header)
    for name, (kind, shape) in forms.items():
        count = math.prod(shape)
        found[name] = np.frombuffer(data, _TYPES[kind], count, offset).reshape(shape)
        offset += count * _TYPES[kind].itemsize
    return found
