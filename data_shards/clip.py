"""One clip out of an opened tar: all of it, or the first latent frames by byte range. Everything read is checked."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from io import FileIO
from typing import Any

import torch
from torch import Tensor

from data_shards.files import parse_json, read_into, read_range
from data_shards.index import TAR_BLOCK, ClipEntry, Member, TensorPlace
from data_shards.payload import checksums, decode_all
from data_shards.schema import (
    RECORD_VERSION,
    TENSOR_FIELDS,
    TIME_FIELDS,
    ClipSample,
    fail,
    shown,
    tags_of,
    validate,
)

Extractors = Mapping[str, Mapping[str, Any]]


def read_whole(file: FileIO, entry: ClipEntry, origin: str, extractors: Extractors) -> ClipSample:
    """The clip of `entry`: tar headers and checksums of both members, JSON and tensors against index and contract."""
    payload = read_member(file, entry.key, entry.payload, origin)
    record = read_member(file, entry.key, entry.record, origin)
    meta = _check_record(record, entry, origin, extractors)
    sample = _build(decode_all(payload, entry, origin), entry, meta)
    validate(sample, origin, extractors)
    return sample


def read_prefix(
    file: FileIO, entry: ClipEntry, origin: str, extractors: Extractors, frames: int, beyond: int
) -> ClipSample:
    """The first `frames` latent frames, of the audio `beyond` more: only their bytes are read (and the JSON member)."""
    record = _read_content(file, entry.key, entry.record, origin)
    meta = _check_record(record, entry, origin, extractors)
    tensors = {}
    for name, place in entry.tensors.items():
        wanted = frames + beyond if name == "audio" else frames
        parts = wanted if name in TIME_FIELDS else place.shape[0]
        tensors[name] = _read_parts(file, entry, name, place, parts, origin)
    sample = _build(tensors, entry, meta)
    validate(sample, origin, extractors, beyond=beyond)
    return sample


def _read_parts(file: FileIO, entry: ClipEntry, name: str, place: TensorPlace, parts: int, origin: str) -> Tensor:
    size = place.size // place.shape[0] * parts
    room = torch.empty(size, dtype=torch.uint8)  # the tensor's own memory: nothing is copied on the way
    data = room.numpy().data
    count = read_into(file, place.offset, data)
    if count != size:
        raise fail(origin, entry.key, name, f"{count} bytes", f"{size} (truncated tar)")
    found = checksums(data, parts if name in TIME_FIELDS else 1)
    if not place.crc32.startswith(found):
        start = next(i for i in range(0, len(found), 8) if found[i : i + 8] != place.crc32[i : i + 8])
        where = f" of latent frame {start // 8}" if name in TIME_FIELDS else ""
        value = f"crc32 {found[start : start + 8]}{where}"
        raise fail(origin, entry.key, name, value, f"{place.crc32[start : start + 8]} (damaged data)")
    return room.view(getattr(torch, place.dtype)).view(parts, *place.shape[1:])


def read_member(file: FileIO, key: str, member: Member, origin: str) -> bytes:
    """The content of a member, after a look at the tar's own header before it and the zeros behind it."""
    header = read_range(file, member.offset - TAR_BLOCK, TAR_BLOCK)
    data = _read_content(file, key, member, origin)
    if not _is_header_of(member, header):
        value = "another tar header"
        raise fail(origin, key, member.name, value, "that of a file with this name and size (damaged data)")
    end = member.offset + member.size
    filling = read_range(file, end, -member.size % TAR_BLOCK)
    if filling.strip(b"\0"):
        raise fail(origin, key, member.name, "bytes behind its end", "zeros up to a whole block (damaged data)")
    return data


def _read_content(file: FileIO, key: str, member: Member, origin: str) -> bytes:
    data = read_range(file, member.offset, member.size)
    if len(data) != member.size:
        raise fail(origin, key, member.name, f"{len(data)} bytes", f"{member.size} (truncated tar)")
    checksum = zlib.crc32(data)
    if checksum != member.crc32:
        raise fail(origin, key, member.name, f"crc32 {checksum}", f"{member.crc32} (damaged data)")
    return data


def _is_header_of(member: Member, header: bytes) -> bool:
    # A link, device or second name here would mean something else to tar than the index means to this reader.
    name, size, checksum, kind, magic, prefix = (
        header[start:end] for start, end in ((0, 100), (124, 136), (148, 156), (156, 157), (257, 262), (345, 500))
    )
    total = sum(header) - sum(checksum) + 8 * ord(" ")
    return (
        name.rstrip(b"\0") == member.name.encode("ascii")
        and _octal(size) == member.size
        and _octal(checksum) == total
        and kind in (b"0", b"\0")
        and magic == b"ustar"
        and not prefix.strip(b"\0")
    )


def _octal(field: bytes) -> int:
    digits = field.strip(b"\0 ")
    return int(digits, 8) if digits.isdigit() and not set(digits) & set(b"89") else -1


def _check_record(record: bytes, entry: ClipEntry, origin: str, extractors: Extractors) -> dict[str, Any]:
    """The `meta` of a clip whose JSON member says what index and manifest say."""
    document = parse_json(record, f"{origin}: sample {entry.key!r}: {entry.record.name}")
    expected: dict[str, object] = {
        "shard_version": RECORD_VERSION,
        "key": entry.key,
        "identity": entry.identity,
        "frames": entry.frames,
    }
    for field, value in expected.items():
        found = document.get(field)
        if type(found) is not type(value) or found != value:
            raise fail(origin, entry.key, field, shown(found), f"{shown(value)}, as in the index")
    tags = tags_of(extractors)
    if document.get("extractors") != tags:
        raise fail(origin, entry.key, "extractors", shown(document.get("extractors")), f"{tags}, the manifest's tags")
    meta = document.get("meta")
    if not isinstance(meta, dict):
        raise fail(origin, entry.key, "meta", shown(meta), "a JSON object")
    return meta


def _build(tensors: Mapping[str, Tensor], entry: ClipEntry, meta: dict[str, Any]) -> ClipSample:
    fields: dict[str, Any] = {name: tensors.get(name) for name in TENSOR_FIELDS}
    return ClipSample(key=entry.key, identity=entry.identity, meta=meta, **fields)
