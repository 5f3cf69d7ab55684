"""The JSON indexes that versions 1 and 2 had beside each tar: what they say of a clip, checked against its bytes.

Version 1 lists members with crc32, and dtype and shape of tensors. Version 2 adds to each tensor its offset in the tar
and a crc32 of each latent frame, 8 hexadecimal digits each.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from data_shards.index import TAR_BLOCK, rounded_up
from data_shards.layout import Layout, Part
from data_shards.schema import MAX_CLIP_BYTES, MAX_RECORD_BYTES, ShardError, check_key, fail, shown

_MAX_CLIPS = 8192
_MAX_BYTES = {"json": MAX_RECORD_BYTES, "safetensors": MAX_CLIP_BYTES}


class Member(NamedTuple):
    """Content of one member of the tar."""

    offset: int
    size: int
    crc32: int


class OldClip(NamedTuple):
    """One entry; `tensors` is as it stands there, and not checked."""

    key: str
    identity: str
    frames: int
    record: Member
    payload: Member
    tensors: Any


def old_clips(document: Mapping[str, Any], tar_name: str, origin: str) -> list[OldClip]:
    """The entries, whose members follow each other in the tar; ShardError names clip and field of another one."""
    if document.get("shard") != tar_name:
        raise ShardError(f"{origin}: shard: {shown(document.get('shard'))}: expected {tar_name!r}")
    samples = document.get("samples")
    if not isinstance(samples, list) or not 1 <= len(samples) <= _MAX_CLIPS:
        value = f"{len(samples)} samples" if isinstance(samples, list) else shown(samples)
        raise ShardError(f"{origin}: samples: {value}: expected a list of 1 to {_MAX_CLIPS} clips")
    clips, end = [], 0
    for sample in samples:
        clip = _entry(sample if isinstance(sample, dict) else {}, origin)
        for kind, member in (("json", clip.record), ("safetensors", clip.payload)):
            if member.offset != end + TAR_BLOCK:
                expected = f"{end + TAR_BLOCK}, in sequence"
                raise fail(origin, clip.key, f"members.{kind}.offset", member.offset, expected)
            end = member.offset + rounded_up(member.size, TAR_BLOCK)
        clips.append(clip)
    return clips


def check_bytes(clip: OldClip, record: bytes | bytearray, payload: bytes | bytearray, origin: str) -> None:
    """ShardError unless the members have the sums of the entry."""
    for kind, member, data in (("json", clip.record, record), ("safetensors", clip.payload, payload)):
        if len(data) != member.size or zlib.crc32(data) != member.crc32:
            value, expected = f"crc32 {zlib.crc32(data)} of {len(data)} bytes", f"{member.crc32} of {member.size}"
            raise fail(origin, clip.key, f"{clip.key}.{kind}", value, f"{expected} (damaged data)")


def tensors_of_1(clip: OldClip, payload: bytes | bytearray, layout: Layout) -> dict[str, dict[str, Any]]:
    """What an index of version 1 says of the tensors of a clip with this member."""
    return {part.name: {"dtype": part.dtype, "shape": list(part.shape)} for part in layout.parts}


def tensors_of_2(clip: OldClip, payload: bytes | bytearray, layout: Layout) -> dict[str, dict[str, Any]]:
    """What an index of version 2 says of them."""
    start, table = clip.payload.offset + len(layout.header), tensors_of_1(clip, payload, layout)
    for part in layout.parts:
        table[part.name] |= {"offset": start + part.offset, "crc32": _crc32s(payload, layout, part)}
    return table


def _crc32s(payload: bytes | bytearray, layout: Layout, part: Part) -> str:
    start, data = len(layout.header) + part.offset, memoryview(payload)
    starts = range(start, start + part.frames * part.stride, part.stride)
    return "".join(f"{zlib.crc32(data[first : first + part.stride]):08x}" for first in starts)


def _entry(sample: Mapping[str, Any], origin: str) -> OldClip:
    key, identity, frames = sample.get("key"), sample.get("identity"), sample.get("frames")
    check_key(key, origin)  # type: ignore[arg-type]  # any type: that is what it checks
    if not isinstance(identity, str) or not identity:
        raise fail(origin, str(key), "identity", shown(identity), "a name of the source")
    if type(frames) is not int or not 1 <= frames <= MAX_CLIP_BYTES:
        raise fail(origin, str(key), "frames", shown(frames), "a whole number of at least 1")
    record, payload = (_member(sample, str(key), kind, origin) for kind in ("json", "safetensors"))
    return OldClip(str(key), identity, frames, record, payload, sample.get("tensors"))


def _member(sample: Mapping[str, Any], key: str, kind: str, origin: str) -> Member:
    members = sample.get("members")
    member = members.get(kind) if isinstance(members, dict) else None
    if not isinstance(member, dict):
        raise fail(origin, key, f"members.{kind}", shown(member), "an object")
    if member.get("name") != f"{key}.{kind}":
        raise fail(origin, key, f"members.{kind}.name", shown(member.get("name")), f"{key}.{kind}")
    numbers = []
    for field, most in (("offset", 2**62), ("size", _MAX_BYTES[kind]), ("crc32", 2**32 - 1)):
        value = member.get(field)
        if type(value) is not int or not 0 <= value <= most:
            raise fail(origin, key, f"members.{kind}.{field}", shown(value), f"a whole number from 0 to {most}")
        numbers.append(value)
    return Member(*numbers)
