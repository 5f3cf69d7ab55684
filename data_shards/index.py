"""The index beside a tar: where every clip, member and tensor lies, and the checksums of what lies there.

An index is checked as a whole when a set is opened. Afterwards every offset in it is a whole number inside the tar, the
members follow each other as a tar of exactly these members has them, and the tensors fill their safetensors member
without gap or overlap; a reader can take byte ranges from it without another look.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from data_shards.schema import (
    MAX_CLIP_BYTES,
    MAX_RECORD_BYTES,
    OPTIONAL_FIELDS,
    TENSOR_FIELDS,
    TIME_FIELDS,
    ShardError,
    check_key,
    fail,
    shown,
)

TAR_BLOCK = 512
TAR_RECORD = 20 * TAR_BLOCK  # a tar ends with two empty blocks and is filled up to a whole record
MAX_CLIPS = 8192  # of one tar, so that its index stays small enough to be parsed
ITEM_SIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "bool": 1, "uint8": 1, "int8": 1, "int16": 2,
             "int32": 4, "int64": 8}  # fmt: skip
_HEX = re.compile(r"[0-9a-f]*")
_MAX_BYTES = {"json": MAX_RECORD_BYTES, "safetensors": MAX_CLIP_BYTES}


class Member(NamedTuple):
    """Content of one member of the tar."""

    name: str
    offset: int
    size: int
    crc32: int


class TensorPlace(NamedTuple):
    """Bytes of one tensor: absolute offset in the tar, and 8 hexadecimal digits of crc32 per latent frame (or in all,
    for a tensor without time)."""

    offset: int
    dtype: str
    shape: tuple[int, ...]
    crc32: str

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


class ClipEntry(NamedTuple):
    """One clip of the index."""

    key: str
    identity: str
    frames: int
    record: Member
    payload: Member
    tensors: dict[str, TensorPlace]


class ShardIndex(NamedTuple):
    """A checked index: size of the tar in bytes, and its clips in order."""

    bytes: int
    clips: list[ClipEntry]


def check_index(document: Mapping[str, Any], tar_name: str, origin: str) -> ShardIndex:
    """The index in `document`, of which the version has been checked; ShardError names the clip and field at fault."""
    if document.get("shard") != tar_name:
        raise ShardError(f"{origin}: shard: {shown(document.get('shard'))}: expected {tar_name!r}")
    samples = document.get("samples")
    if not isinstance(samples, list) or not 1 <= len(samples) <= MAX_CLIPS:
        value = f"{len(samples)} samples" if isinstance(samples, list) else shown(samples)
        raise ShardError(f"{origin}: samples: {value}: expected a list of 1 to {MAX_CLIPS} clips")
    clips, end = [], 0
    for number, sample in enumerate(samples):
        if not isinstance(sample, dict):
            raise ShardError(f"{origin}: samples[{number}]: {shown(sample)}: expected an object")
        clip = _entry(sample, origin)
        for member in (clip.record, clip.payload):
            if member.offset != end + TAR_BLOCK:
                raise fail(origin, clip.key, f"{member.name}: offset", member.offset, f"{end + TAR_BLOCK}, in sequence")
            end = member.offset + rounded_up(member.size, TAR_BLOCK)
        clips.append(clip)
    total = rounded_up(end + 2 * TAR_BLOCK, TAR_RECORD)
    if type(document.get("bytes")) is not int or document["bytes"] != total:
        raise ShardError(f"{origin}: bytes: {shown(document.get('bytes'))}: expected {total}, a tar of these members")
    return ShardIndex(total, clips)


def rounded_up(size: int, block: int) -> int:
    """`size`, filled up to whole blocks."""
    return -(-size // block) * block


def check_member(sample: Mapping[str, Any], kind: str, origin: str) -> Member:
    """Place of the "json" or "safetensors" member of an index entry, with a size that may be read."""
    key, members = sample["key"], sample.get("members")
    member = members.get(kind) if isinstance(members, dict) else None
    if not isinstance(member, dict):
        raise fail(origin, key, f"members.{kind}", shown(member), "an object")
    name = f"{key}.{kind}"
    if member.get("name") != name:
        raise fail(origin, key, f"members.{kind}.name", member.get("name"), name)
    numbers = []
    for field, most in (("offset", 2**62), ("size", _MAX_BYTES[kind]), ("crc32", 2**32 - 1)):
        value = member.get(field)
        if type(value) is not int or not 0 <= value <= most:
            raise fail(origin, key, f"members.{kind}.{field}", shown(value), f"a whole number from 0 to {most}")
        numbers.append(value)
    return Member(name, *numbers)


def check_names(sample: Mapping[str, Any], origin: str) -> tuple[str, str, int]:
    """Key, identity and number of latent frames of an index entry."""
    key, identity, frames = sample.get("key"), sample.get("identity"), sample.get("frames")
    check_key(key, origin)  # type: ignore[arg-type]  # any type: that is what it checks
    if not isinstance(identity, str) or not identity:
        raise fail(origin, str(key), "identity", shown(identity), "a name of the source")
    if type(frames) is not int or not 1 <= frames <= MAX_CLIP_BYTES:
        raise fail(origin, str(key), "frames", shown(frames), "a whole number of at least 1")
    return str(key), identity, frames


def _entry(sample: Mapping[str, Any], origin: str) -> ClipEntry:
    key, identity, frames = check_names(sample, origin)
    payload = check_member(sample, "safetensors", origin)
    found = sample.get("tensors")
    if not isinstance(found, dict):
        raise fail(origin, key, "tensors", shown(found), "an object")
    for name in found:
        if name not in TENSOR_FIELDS:
            raise fail(origin, key, f"tensors.{name}", "unknown tensor", f"one of {', '.join(TENSOR_FIELDS)}")
    tensors = {}
    for name in TENSOR_FIELDS:
        if name in found:
            tensors[name] = _place(found[name], key, name, frames, origin)
        elif name not in OPTIONAL_FIELDS:
            raise fail(origin, key, f"tensors.{name}", "absent", "a tensor of every clip")
    _check_filled(tensors, payload, key, origin)
    return ClipEntry(key, identity, frames, check_member(sample, "json", origin), payload, tensors)


def _place(value: Any, key: str, name: str, frames: int, origin: str) -> TensorPlace:
    field = f"tensors.{name}"
    if not isinstance(value, dict):
        raise fail(origin, key, field, shown(value), "an object")
    offset, dtype, shape, crc32 = (value.get(part) for part in ("offset", "dtype", "shape", "crc32"))
    if type(offset) is not int or not 0 <= offset <= 2**62:
        raise fail(origin, key, f"{field}.offset", shown(offset), "a whole number of at least 0")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise fail(origin, key, f"{field}.dtype", shown(dtype), f"one of {', '.join(ITEM_SIZE)}")
    if not isinstance(shape, list) or not 1 <= len(shape) <= 8:
        raise fail(origin, key, f"{field}.shape", shown(shape), "a list of 1 to 8 lengths")
    if any(type(length) is not int or not 1 <= length <= MAX_CLIP_BYTES for length in shape):
        raise fail(origin, key, f"{field}.shape", shown(shape), "whole numbers of at least 1 that fit a clip")
    if name in TIME_FIELDS and shape[0] != frames:
        raise fail(origin, key, f"{field}.shape", shown(shape), f"{frames} latent frames, as in the entry")
    parts = frames if name in TIME_FIELDS else 1
    if not isinstance(crc32, str) or len(crc32) != 8 * parts or not _HEX.fullmatch(crc32):
        raise fail(origin, key, f"{field}.crc32", shown(crc32), f"{parts} times 8 digits of 0-9 a-f")
    return TensorPlace(offset, dtype, tuple(shape), crc32)


def _check_filled(tensors: Mapping[str, TensorPlace], payload: Member, key: str, origin: str) -> None:
    # The tensors lie one after the other from behind the header to the end of the member.
    end = payload.offset + payload.size
    for name, place in sorted(tensors.items(), key=lambda item: item[1].offset, reverse=True):
        if place.offset + place.size != end:
            where = f"bytes {place.offset} to {place.offset + place.size}"
            raise fail(origin, key, f"tensors.{name}", where, f"to {end}, where what follows begins")
        end = place.offset
    if end < payload.offset + 8:
        raise fail(origin, key, "tensors", f"from byte {end}", f"{payload.offset + 8} or later, behind the header")
