"""One clip out of a tar: all of it, or its first latent frames by byte range. Everything that is read is checked."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from data_shards.columns import size_of
from data_shards.files import Folder, Range, parse_json
from data_shards.index import TAR_BLOCK, Place, rounded_up, sums_forms
from data_shards.manifest import sums_name_of
from data_shards.plan import Plan
from data_shards.rooms import Rooms
from data_shards.schema import (
    RECORD_VERSION,
    TENSOR_FIELDS,
    TIME_FIELDS,
    ClipSample,
    ShardError,
    are_numbers,
    at,
    check_values,
    fail,
    shown,
)


def read_whole(
    source: Folder, place: Place, tags: Mapping[str, str], rooms: Rooms, plan: Plan, judged: bool
) -> ClipSample:
    """The clip at `place`: the tar's own headers and filling, the header of the safetensors member, every frame.

    `judged`: the values of bytes with these checksums have been looked at before, and need not be again.
    """
    row, layout = read_row(source, place), place.layout
    head = bytearray(2 * TAR_BLOCK + rounded_up(place.record_bytes, TAR_BLOCK) + len(layout.header))
    room = rooms.take(plan.size)
    rest = bytearray(-layout.size % TAR_BLOCK)
    data = place.start + len(head)
    ranges = [
        (place.start, memoryview(head)),
        (data, room.numpy().data[: layout.data]),
        (data + layout.data, memoryview(rest)),
    ]
    counts = source.fill(place.tar, ranges)
    origin = _origin(source, place)
    _check_read(counts[:1], [("json", len(head))], origin, place)
    record = bytes(head[TAR_BLOCK : TAR_BLOCK + place.record_bytes])
    meta = _check_record(record, row, place, origin, tags)
    _check_read(counts[1:], [("safetensors", layout.data), ("safetensors", len(rest))], origin, place)
    filling = head[TAR_BLOCK + place.record_bytes : -TAR_BLOCK - len(layout.header)]
    payload_header = head[-TAR_BLOCK - len(layout.header) : -len(layout.header)]
    _check_member(f"{place.key}.json", place.record_bytes, head[:TAR_BLOCK], filling, origin)
    _check_member(f"{place.key}.safetensors", layout.size, payload_header, rest, origin)
    if not head.endswith(layout.header):
        raise at(origin, f"{place.key}.safetensors", "another header", "that of its layout (damaged data)")
    return _sample(room, plan, row, place, meta, origin, judged)


def read_prefix(
    source: Folder, place: Place, tags: Mapping[str, str], rooms: Rooms, plan: Plan, judged: bool
) -> ClipSample:
    """The first latent frames, as `plan` has them: only their bytes are read, and the JSON member. See
    `read_whole`."""
    row, layout = read_row(source, place), place.layout
    record = bytearray(place.record_bytes)
    # The tensors' own memory, once for all of them: nothing is copied on the way.
    room = rooms.take(plan.size)
    view = room.numpy().data
    data = place.start + 2 * TAR_BLOCK + rounded_up(place.record_bytes, TAR_BLOCK) + len(layout.header)
    ranges: list[Range] = [(place.start + TAR_BLOCK, memoryview(record))]
    ranges += [(data + piece.part.offset, view[piece.start : piece.start + piece.size]) for piece in plan.pieces]
    counts = source.fill(place.tar, ranges)
    origin = _origin(source, place)
    wanted = [("json", len(record)), *((piece.part.name, piece.size) for piece in plan.pieces)]
    _check_read(counts, wanted, origin, place)
    meta = _check_record(bytes(record), row, place, origin, tags)
    return _sample(room, plan, row, place, meta, origin, judged)


def read_row(source: Folder, place: Place) -> tuple[int, ...]:
    """The checksums of a clip, checked against the index of the set."""
    words = place.layout.words
    name, room = sums_name_of(place.tar), bytearray(8 * words)
    offset = size_of(sums_forms(place.rows, words)) - len(room) * (place.rows - place.row)
    try:
        count = source.fill(name, [(offset, memoryview(room))])[0]
        found = xxh3_64_intdigest(room)
        if count != len(room) or found != place.sum:
            value = f"xxh3 {found:016x}" if count == len(room) else f"{count} bytes"
            expected = f"{len(room)} bytes of xxh3 {place.sum:016x}, the index's (damaged data)"
            raise fail(source.label(name), place.key, "checksums", value, expected)
    except ShardError as error:
        error.shard = name
        raise
    return struct.unpack(f"<{words}Q", room)


def _origin(source: Folder, place: Place) -> str:
    return f"{source.label(place.tar)}: sample {place.key!r}"


def _check_read(counts: list[int], wanted: list[tuple[str, int]], origin: str, place: Place) -> None:
    for count, (name, size) in zip(counts, wanted, strict=True):
        if count != size:
            field = f"{place.key}.{name}" if name in ("json", "safetensors") else name
            raise at(origin, field, f"{count} bytes", f"{size} (truncated tar)")


def _check_record(
    record: bytes, row: tuple[int, ...], place: Place, origin: str, tags: Mapping[str, str]
) -> dict[str, Any]:
    """The `meta` of a clip whose JSON member is the one that was written and says what index and manifest say."""
    name, found = f"{place.key}.json", xxh3_64_intdigest(record)
    try:
        if found != row[0]:
            raise at(origin, name, f"xxh3 {found:016x}", f"{row[0]:016x} (damaged data)")
        return _meta(parse_json(record, f"{origin}: {name}"), place, origin, tags)
    except ShardError as error:
        error.member = name  # whichever field of it is wrong
        raise


def _meta(document: Mapping[str, Any], place: Place, origin: str, tags: Mapping[str, str]) -> dict[str, Any]:
    expected: dict[str, object] = {
        "shard_version": RECORD_VERSION,
        "key": place.key,
        "identity": place.identity,
        "frames": place.layout.frames,
    }
    for field, value in expected.items():
        stated = document.get(field)
        if type(stated) is not type(value) or stated != value:
            raise at(origin, field, shown(stated), f"{shown(value)}, as in the index")
    if document.get("extractors") != tags:
        raise at(origin, "extractors", shown(document.get("extractors")), f"{tags}, the manifest's tags")
    meta = document.get("meta")
    if not isinstance(meta, dict):
        raise at(origin, "meta", shown(meta), "a JSON object")
    return meta


def _sample(
    room: Tensor, plan: Plan, row: tuple[int, ...], place: Place, meta: dict[str, Any], origin: str, judged: bool
) -> ClipSample:
    """The clip whose tensors are in `room`: every frame has the checksum of the row, every number is one."""
    data = room.numpy()
    _check_frames(data.data, plan, row, origin)
    fields: dict[str, Any] = dict.fromkeys(TENSOR_FIELDS)
    numbers = {dtype: room.view(getattr(torch, dtype)) for _, dtype in plan.numbers}
    for piece in plan.pieces:
        part = piece.part
        fields[part.name] = numbers[part.dtype].as_strided(piece.shape, part.strides, piece.first)
    # Repeated slots are compared bit by bit, which equal numbers need not be.
    if not judged and not (
        all(are_numbers(data[span], dtype) for span, dtype in plan.numbers)
        and all(data[some].tobytes() == data[others].tobytes() for some, others in plan.repeated)
    ):
        check_values({name: value for name, value in fields.items() if value is not None}, origin)
    return ClipSample(key=place.key, identity=place.identity, meta=meta, **fields)


def _check_frames(view: memoryview, plan: Plan, row: tuple[int, ...], origin: str) -> None:
    for piece in plan.pieces:
        # Without a line of Python for each frame: small tensors have as many as large ones.
        found = tuple(map(xxh3_64_intdigest, map(view.__getitem__, map(slice, piece.starts, piece.ends))))
        expected = row[piece.words]
        if found != expected:
            name, frame = piece.part.name, next(i for i, word in enumerate(found) if word != expected[i])
            where = f" of latent frame {frame}" if name in TIME_FIELDS else ""
            value = f"xxh3 {found[frame]:016x}{where}"
            raise at(origin, name, value, f"{expected[frame]:016x} (damaged data)")


def _check_member(name: str, size: int, header: bytearray, filling: bytearray, origin: str) -> None:
    """The tar's own header before a member and the zeros behind it: tar and this reader must see the same."""
    if not _is_header_of(name, size, bytes(header)):
        raise at(origin, name, "another tar header", "that of a file with this name and size (damaged data)")
    if filling.strip(b"\0"):
        raise at(origin, name, "bytes behind its end", "zeros up to a whole block (damaged data)")


def _is_header_of(name: str, size: int, header: bytes) -> bool:
    # A link, device or second name here would mean something else to tar than the index means to this reader.
    checksum = header[148:156]
    return (
        header[:100].rstrip(b"\0") == name.encode("ascii")
        and _octal(header[124:136]) == size
        and _octal(checksum) == _sum(header) - sum(checksum) + 8 * ord(" ")
        and header[156] in b"0\0"
        and header[257:262] == b"ustar"
        and not header[345:500].strip(b"\0")
    )


def _sum(header: bytes) -> int:
    """The sum of 512 bytes. The lower half of an Adler-32 that starts at 0 is the sum of the bytes modulo 65521, which
    256 bytes stay below."""
    return (zlib.adler32(header[:256], 0) & 0xFFFF) + (zlib.adler32(header[256:], 0) & 0xFFFF)


def _octal(field: bytes) -> int:
    digits = field.strip(b"\0 ")
    try:
        return int(digits, 8) if digits.isdigit() else -1
    except ValueError:
        return -1
