"""Writing a safetensors file one tensor at a time, so that an export never holds more than one tensor.

The format (safetensors, "Format" section of its README): 8 bytes little-endian length of the header, the header as JSON
padded with spaces to a multiple of 8, then the tensors without gaps, little-endian and row-major.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class PlannedTensor(NamedTuple):
    """A tensor to be written: `load` is called once, when its turn comes."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


def byte_count(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of a tensor of `shape` stored as `dtype`."""
    return torch.Size(shape).numel() * dtype.itemsize


def write_tensors(path: Path, tensors: Sequence[PlannedTensor], dtype: torch.dtype) -> str:
    """Write `tensors` to `path` as `dtype` and return the file's sha256.

    Raises ValueError when a loaded tensor has another shape than planned, or a value that is not finite.
    """
    if sys.byteorder != "little":
        raise ValueError(f"{path}: safetensors files are little-endian, this machine is not")
    digest = hashlib.sha256()
    with path.open("wb") as file:
        header = _header(tensors, dtype)
        file.write(header)
        digest.update(header)
        for planned in tensors:
            data = _bytes(planned, dtype)
            file.write(data)
            digest.update(data)
    return digest.hexdigest()


def _header(tensors: Sequence[PlannedTensor], dtype: torch.dtype) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for planned in tensors:
        end = offset + byte_count(planned.shape, dtype)
        entries[planned.name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(planned.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _bytes(planned: PlannedTensor, dtype: torch.dtype) -> memoryview:
    tensor = planned.load().detach()
    if tuple(tensor.shape) != planned.shape:
        raise ValueError(f"{planned.name}: shape {list(tensor.shape)}: expected {list(planned.shape)}")
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{planned.name}: contains NaN or infinity: expected finite weights")
    flat = tensor.to("cpu", dtype).contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
