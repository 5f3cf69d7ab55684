"""Shard set -> ClipSample, by byte range through the index beside each tar.

Nothing in a shard is executed: a member is either safetensors or JSON, and webdataset's decoders are not used. Every
byte that is read is checked against the index, and the indexes against the manifest.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_shards.clip import read_prefix, read_whole
from data_shards.files import encode_json, open_plain, parse_json, read_document, read_range
from data_shards.index import ClipEntry, ShardIndex, check_index
from data_shards.manifest import check_seal, check_version, index_name_of, read_manifest
from data_shards.schema import SPLITS, ClipSample, ShardError, fail, shown, tags_of


class Place(NamedTuple):
    """Where a clip lies: its tar and its entry in the index."""

    tar: Path
    entry: ClipEntry


class ShardSet:
    """An opened shard set: `manifest` as it is on disk, and its splits."""

    def __init__(self, root: Path, manifest: dict[str, Any], places: Mapping[str, list[Place]]) -> None:
        self.root = root
        self.manifest = manifest
        self._places = places

    @property
    def hash(self) -> str:
        """What tells the set from any other, and from itself before a change: hex sha256 of its manifest, which has
        the hashes of all its files."""
        own = {key: value for key, value in self.manifest.items() if key != "sha256"}
        return hashlib.sha256(encode_json(own, str(self.root))).hexdigest()

    @classmethod
    def open(cls, root: Path) -> ShardSet:
        """Read manifest and indexes of the set in folder `root`; the tars are not read.

        Raises ShardError for a missing or foreign manifest, another version, a missing tar or index, anything but plain
        files, a tar of another size (truncated), an index that changed or whose places do not fill its tar, tags that
        differ between manifest and shards, a key used twice, an identity in two splits, or counts that do not add up.
        """
        manifest = read_manifest(root)
        places = {
            split: [
                Place(root / name, entry)
                for name in manifest["splits"][split]["shards"]
                for entry in _open_shard(root, name, manifest).clips
            ]
            for split in SPLITS
        }
        check_counts(places, manifest, str(root / "manifest.json"))
        return cls(root, manifest, places)

    def split(self, name: str) -> ShardReader:
        """Reader of "train" or "validation"; ShardError for another name."""
        if name not in SPLITS:
            raise ShardError(f"{self.root}: split: {name!r}: expected one of {', '.join(SPLITS)}")
        return ShardReader(self.root, self.manifest, self._places[name])

    def verify(self) -> None:
        """Read manifest and every tar to the end; ShardError names the first whose bytes are not those written."""
        check_seal(self.root)
        last = {place.tar: place.entry for places in self._places.values() for place in places}
        for tar, entry in last.items():
            _check_tar(tar, entry, self.manifest["files"][tar.name]["sha256"])


class ShardReader:
    """The clips of one split, in the order in which they were written. Safe to use from several threads."""

    def __init__(self, root: Path, manifest: Mapping[str, Any], places: list[Place]) -> None:
        self.root = root
        self.manifest = manifest
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def keys(self) -> list[str]:
        """Key of every clip."""
        return [place.entry.key for place in self._places]

    @property
    def frames(self) -> int:
        """F, latent frames of every clip."""
        return int(self.manifest["frames"])

    def read(self, index: int, frames: int | None = None, beyond: int = 0) -> ClipSample:
        """Clip `index` (0 <= index < len), verified against index and contract.

        With `frames`, only the first `frames` latent frames: a crop, which is always a prefix. Its audio has `beyond`
        latent frames more, or as many as the clip has: windows with c frames (50 Hz) of context look beyond the crop
        and are those of the whole clip if `beyond` is at least c / 8, rounded up. Only these bytes and the JSON member
        are read, each frame under its own checksum; `frames` equal to F reads and checks the whole clip.
        Raises ShardError naming tar, sample and field for damage of any kind or `frames` outside 1..F, IndexError for
        an index out of range, ValueError for a negative `beyond`.
        """
        if not 0 <= index < len(self._places):
            raise IndexError(f"clip {index} of {self.root}: expected 0 to {len(self._places) - 1}")
        if beyond < 0:
            raise ValueError(f"beyond: {beyond}: expected at least 0 latent frames")
        tar, entry = self._places[index]
        origin, extractors = str(tar), self.manifest["extractors"]
        if frames is not None and not 1 <= frames <= entry.frames:
            raise fail(origin, entry.key, "frames", frames, f"1 to {entry.frames}, the latent frames of the clip")
        try:
            with open_plain(tar) as file:
                if frames is None or frames == entry.frames:
                    return read_whole(file, entry, origin, extractors)
                return read_prefix(file, entry, origin, extractors, frames, min(beyond, entry.frames - frames))
        except OSError as error:
            raise ShardError(f"{origin}: sample {entry.key!r}: {error}: expected a readable tar") from None


def _open_shard(root: Path, name: str, manifest: Mapping[str, Any]) -> ShardIndex:
    tar, path = root / name, root / index_name_of(name)
    with open_plain(tar) as file:
        size = os.fstat(file.fileno()).st_size
    data = read_document(path)
    document = parse_json(data, str(path))
    check_version(document, str(path))
    tags = tags_of(manifest["extractors"])
    if document.get("extractors") != tags:
        raise ShardError(
            f"{path}: extractors: {shown(document.get('extractors'))}: expected {tags}, the manifest's tags"
        )
    digest = hashlib.sha256(data).hexdigest()
    expected = manifest["files"][path.name]["sha256"]
    if digest != expected:
        raise ShardError(f"{path}: sha256 {digest}: expected {expected}, the manifest's")
    index = check_index(document, name, str(path))
    if size != index.bytes:
        raise ShardError(f"{tar}: {size} bytes: expected {index.bytes}, as in its index (truncated or changed)")
    if manifest["files"][name]["bytes"] != index.bytes:
        listed = manifest["files"][name]["bytes"]
        raise ShardError(f"{root / 'manifest.json'}: files.{name}.bytes: {listed}: expected {index.bytes}, the tar's")
    return index


def _check_tar(tar: Path, last: ClipEntry, expected: str) -> None:
    """Its sum, and that it ends behind its last clip: more members would be seen by other readers only."""
    with open_plain(tar) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != expected:
            raise ShardError(f"{tar}: sha256 {digest}: expected {expected}, the manifest's")
        end = last.payload.offset + last.payload.size
        if read_range(file, end, os.fstat(file.fileno()).st_size - end).strip(b"\0"):
            raise ShardError(f"{tar}: bytes behind the last member: expected zeros from {end} on")


def check_counts(places: Mapping[str, list[Place]], manifest: Mapping[str, Any], origin: str) -> None:
    """ShardError unless the clips of all splits are as many, and of those identities, as the manifest says."""
    split_of: dict[str, str] = {}
    seen: set[str] = set()
    for split, clips in places.items():
        listed = manifest["splits"][split]
        identities = frozenset(listed["identities"])
        if len(clips) != listed["samples"]:
            raise ShardError(
                f"{origin}: splits.{split}.samples: {listed['samples']}: expected {len(clips)}, the indexes'"
            )
        for place in clips:
            key, identity = place.entry.key, place.entry.identity
            if place.entry.frames != manifest["frames"]:
                value = f"{place.entry.frames} latent frames"
                raise fail(str(place.tar), key, "frames", value, f"{manifest['frames']}, the manifest's frames")
            if key in seen:
                raise fail(str(place.tar), key, "key", key, "a key that no other clip of the set has")
            seen.add(key)
            if split_of.setdefault(identity, split) != split:
                raise fail(
                    str(place.tar), key, "identity", identity, f"an identity that is not in {split_of[identity]}"
                )
            if identity not in identities:
                expected = f"one that the manifest lists under splits.{split}"
                raise fail(str(place.tar), key, "identity", identity, expected)
        unused = identities - {place.entry.identity for place in clips}
        if unused:
            raise ShardError(f"{origin}: splits.{split}.identities: {shown(min(unused))}: expected one that has a clip")
