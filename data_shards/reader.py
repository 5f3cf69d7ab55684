"""Shard set -> ClipSample, by byte range through the index beside each tar.

Nothing in a shard is executed: a member is either safetensors or JSON, and webdataset's decoders are not used. Every
byte that is read is checked against the index, and the indexes against the manifest.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load as decode_tensors
from torch import Tensor

from data_shards.schema import (
    SHARD_VERSION,
    SPLITS,
    TENSOR_FIELDS,
    ClipSample,
    ShardError,
    check_extractors,
    check_key,
    fail,
    tags_of,
    validate,
)

_TAR_NAME = re.compile(rf"({'|'.join(SPLITS)})-\d{{6}}\.tar")
_OPTIONAL_FIELDS = ("flame", "flame_valid", "text")


class _Place(NamedTuple):
    """Where a clip lies: its tar and its entry in the index."""

    tar: Path
    entry: Mapping[str, Any]


class ShardSet:
    """An opened shard set: `manifest` as it is on disk, and its splits."""

    def __init__(self, root: Path, manifest: dict[str, Any], places: Mapping[str, list[_Place]]) -> None:
        self.root = root
        self.manifest = manifest
        self._places = places

    @classmethod
    def open(cls, root: Path) -> ShardSet:
        """Read manifest and indexes of the set in folder `root`; the tars are not read.

        Raises ShardError for a missing or foreign manifest, another version, a missing tar or index, a tar of another
        size (truncated), an index that changed, tags that differ between manifest and shards, a key used twice, an
        identity in two splits, or counts that do not add up.
        """
        path = root / "manifest.json"
        manifest = _parse_json(_read_bytes(path), str(path))
        _check_version(manifest, str(path))
        for key in ("extractors", "frames", "splits", "files", "statistics"):
            if key not in manifest:
                raise ShardError(f"{path}: {key}: absent: expected the key of a shard manifest")
        check_extractors(manifest["extractors"], str(path))
        if type(manifest["frames"]) is not int or manifest["frames"] < 1:
            raise ShardError(f"{path}: frames: {manifest['frames']!r}: expected a whole number of at least 1")
        places: dict[str, list[_Place]] = {}
        try:
            for split in SPLITS:
                places[split] = [
                    place
                    for name in manifest["splits"][split]["shards"]
                    for place in _open_shard(root, name, split, manifest)
                ]
            _check_counts(places, manifest, str(path))
        except (KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{path}: {type(error).__name__} {error}: expected the manifest of a shard set") from None
        return cls(root, manifest, places)

    def split(self, name: str) -> ShardReader:
        """Reader of "train" or "validation"; ShardError for another name."""
        if name not in SPLITS:
            raise ShardError(f"{self.root}: split: {name!r}: expected one of {', '.join(SPLITS)}")
        return ShardReader(self.root, self.manifest, self._places[name])

    def verify(self) -> None:
        """Read every tar to its end; ShardError names the first whose bytes are not those that were written."""
        for tar in dict.fromkeys(place.tar for places in self._places.values() for place in places):
            try:
                with open(tar, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise ShardError(f"{tar}: {error.strerror}: expected a readable tar") from None
            expected = self.manifest["files"][tar.name]["sha256"]
            if digest != expected:
                raise ShardError(f"{tar}: sha256 {digest}: expected {expected}, the manifest's")


class ShardReader:
    """The clips of one split, in the order in which they were written. Safe to use from several threads."""

    def __init__(self, root: Path, manifest: Mapping[str, Any], places: list[_Place]) -> None:
        self.root = root
        self.manifest = manifest
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def keys(self) -> list[str]:
        """Key of every clip."""
        return [place.entry["key"] for place in self._places]

    @property
    def frames(self) -> int:
        """F, latent frames of every clip."""
        return int(self.manifest["frames"])

    def read(self, index: int) -> ClipSample:
        """Clip `index` (0 <= index < len), verified against index and contract.

        Raises ShardError naming tar, sample and field for damage of any kind, IndexError for an index out of range.
        """
        if not 0 <= index < len(self._places):
            raise IndexError(f"clip {index} of {self.root}: expected 0 to {len(self._places) - 1}")
        tar, entry = self._places[index]
        origin, key = str(tar), entry["key"]
        try:
            with open(tar, "rb") as file:
                payload = _read_member(file, entry, "safetensors", origin)
                record = _read_member(file, entry, "json", origin)
        except OSError as error:
            raise ShardError(f"{origin}: sample {key!r}: {error}: expected a readable tar") from None
        tags = tags_of(self.manifest["extractors"])
        meta = _check_record(_parse_json(record, f"{origin}: sample {key!r}"), entry, origin, tags)
        sample = _build(_decode(payload, origin, key), entry, meta, origin)
        validate(sample, origin, self.manifest["extractors"])
        if sample.frames != self.frames:
            raise fail(origin, key, "video", f"{sample.frames} latent frames", f"{self.frames}, the manifest's frames")
        return sample


def _open_shard(root: Path, name: str, split: str, manifest: Mapping[str, Any]) -> list[_Place]:
    found = _TAR_NAME.fullmatch(name)
    if not found or found[1] != split:
        raise ShardError(f"{root / 'manifest.json'}: splits.{split}.shards: {name!r}: expected {split}-NNNNNN.tar")
    tar, index_name = root / name, f"{name.removesuffix('.tar')}.index.json"
    if not tar.is_file():
        raise ShardError(f"{tar}: missing: expected the tar that manifest.json lists")
    data = _read_bytes(root / index_name)
    index = _parse_json(data, str(root / index_name))
    _check_version(index, str(root / index_name))
    tags = tags_of(manifest["extractors"])
    if index["extractors"] != tags:
        raise ShardError(
            f"{root / index_name}: extractors: {index['extractors']!r}: expected {tags}, the manifest's tags"
        )
    digest = hashlib.sha256(data).hexdigest()
    expected = manifest["files"][index_name]["sha256"]
    if digest != expected:
        raise ShardError(f"{root / index_name}: sha256 {digest}: expected {expected}, the manifest's")
    size = tar.stat().st_size
    if size != index["bytes"]:
        raise ShardError(f"{tar}: {size} bytes: expected {index['bytes']}, as in its index (truncated or changed)")
    for entry in index["samples"]:
        check_key(entry["key"], str(root / index_name))
    return [_Place(tar, entry) for entry in index["samples"]]


def _check_counts(places: Mapping[str, list[_Place]], manifest: Mapping[str, Any], origin: str) -> None:
    split_of: dict[str, str] = {}
    seen: set[str] = set()
    for split, clips in places.items():
        listed = manifest["splits"][split]
        if len(clips) != listed["samples"]:
            raise ShardError(
                f"{origin}: splits.{split}.samples: {listed['samples']}: expected {len(clips)}, the indexes'"
            )
        for place in clips:
            key, identity = place.entry["key"], place.entry["identity"]
            if key in seen:
                raise fail(str(place.tar), key, "key", key, "a key that no other clip of the set has")
            seen.add(key)
            if split_of.setdefault(identity, split) != split:
                raise fail(
                    str(place.tar), key, "identity", identity, f"an identity that is not in {split_of[identity]}"
                )


def _read_member(file: BinaryIO, entry: Mapping[str, Any], kind: str, origin: str) -> bytes:
    member = entry["members"][kind]
    file.seek(member["offset"])
    data = file.read(member["size"])
    if len(data) != member["size"]:
        raise fail(origin, entry["key"], member["name"], f"{len(data)} bytes", f"{member['size']} (truncated tar)")
    checksum = zlib.crc32(data)
    if checksum != member["crc32"]:
        raise fail(origin, entry["key"], member["name"], f"crc32 {checksum}", f"{member['crc32']} (damaged data)")
    return data


def _decode(payload: bytes, origin: str, key: str) -> dict[str, Tensor]:
    try:
        return decode_tensors(payload)
    except (SafetensorError, ValueError, KeyError) as error:
        # The first line only: messages of the parser may go on with the bytes that they met.
        reason = str(error).splitlines()[0][:200]
        raise fail(origin, key, f"{key}.safetensors", reason, "a safetensors file") from None


def _check_record(
    record: Mapping[str, Any], entry: Mapping[str, Any], origin: str, tags: dict[str, str]
) -> dict[str, Any]:
    """The `meta` of a clip whose JSON member says what index and manifest say."""
    key = entry["key"]
    _check_version(record, f"{origin}: sample {key!r}")
    for field in ("key", "identity", "frames"):
        if record.get(field) != entry[field]:
            raise fail(origin, key, field, record.get(field), f"{entry[field]!r}, as in the index")
    if record.get("extractors") != tags:
        raise fail(origin, key, "extractors", record.get("extractors"), f"{tags}, the manifest's tags")
    meta = record.get("meta")
    if not isinstance(meta, dict):
        raise fail(origin, key, "meta", meta, "a JSON object")
    return meta


def _build(tensors: dict[str, Tensor], entry: Mapping[str, Any], meta: dict[str, Any], origin: str) -> ClipSample:
    for name in TENSOR_FIELDS:
        if name not in tensors and name not in _OPTIONAL_FIELDS:
            raise fail(origin, entry["key"], name, "absent", "a tensor of the safetensors member")
    for name in tensors:
        if name not in TENSOR_FIELDS:
            raise fail(origin, entry["key"], name[:80], "unknown tensor", f"one of {', '.join(TENSOR_FIELDS)}")
    fields: dict[str, Any] = {name: tensors.get(name) for name in TENSOR_FIELDS}
    return ClipSample(key=entry["key"], identity=entry["identity"], meta=meta, **fields)


def _check_version(document: Mapping[str, Any], origin: str) -> None:
    version = document.get("shard_version")
    if version != SHARD_VERSION:
        raise ShardError(f"{origin}: shard_version: {version!r}: expected {SHARD_VERSION}")


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ShardError(f"{path}: {reason}: expected a file of a shard set") from None


def _parse_json(data: bytes, origin: str) -> dict[str, Any]:
    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not JSON")

    try:
        document = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{origin}: {error}: expected JSON") from None
    if not isinstance(document, dict):
        raise ShardError(f"{origin}: {type(document).__name__}: expected a JSON object")
    return document
