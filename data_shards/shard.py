"""One tar that is being written and the index beside it, and what an interrupted build leaves of both."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from webdataset.writer import TarWriter

from data_shards.files import MAX_JSON_BYTES, PARTIAL, encode_json, parse_json, publish
from data_shards.index import MAX_CLIPS, check_index
from data_shards.manifest import index_name_of
from data_shards.payload import tensor_table
from data_shards.schema import SHARD_VERSION, SPLITS, ClipSample, tags_of

_OWN_FILE = re.compile(
    rf"(?:{'|'.join(SPLITS)})-[0-9]{{6}}\.(?:tar|index\.json)(?:{re.escape(PARTIAL)})?|manifest\.json{re.escape(PARTIAL)}"
)
_MOST_INDEX_BYTES = MAX_JSON_BYTES - 2**16
_UNPLACED = 256  # digits that an entry gains with the offsets


class Shard:
    """One tar that is being written, with the entries of its index."""

    def __init__(self, root: Path, stem: str, extractors: Mapping[str, Mapping[str, Any]]) -> None:
        self.tar_name = f"{stem}.tar"
        self.bytes = 0
        self._root = root
        self._extractors = extractors
        self._entries: list[dict[str, Any]] = []
        self._index_bytes = 0
        self._file: BinaryIO = open(root / (self.tar_name + PARTIAL), "wb")  # noqa: SIM115 - closed in close()
        # A fixed time and owner: the same clips give the same bytes on every machine.
        self._tar = TarWriter(self._file, user="dualforce", group="dualforce", mtime=0, encoder=False, compress=False)

    @property
    def full(self) -> bool:
        """Whether another clip could make the index larger than readers accept."""
        return len(self._entries) >= MAX_CLIPS or self._index_bytes > _MOST_INDEX_BYTES

    def add(self, sample: ClipSample, payload: bytes, record: bytes) -> None:
        """Append the clip, encoded as its two members."""
        self._tar.write({"__key__": sample.key, "safetensors": payload, "json": record})
        self.bytes += len(payload) + len(record)
        members = {kind: {"crc32": zlib.crc32(data)} for kind, data in (("safetensors", payload), ("json", record))}
        entry = {
            "key": sample.key,
            "identity": sample.identity,
            "frames": sample.frames,
            "members": members,
            "tensors": tensor_table(payload, f"{self.tar_name}: sample {sample.key!r}"),
        }
        self._entries.append(entry)
        self._index_bytes += len(encode_json(entry, self.tar_name)) + _UNPLACED

    def close(self) -> dict[str, dict[str, Any]]:
        """Publish tar and index; size and sha256 of both by name."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        partial = self._root / (self.tar_name + PARTIAL)
        # Offsets come from reading the tar back, so an index never disagrees with what tar itself sees.
        with tarfile.open(partial, "r:") as tar:
            places = {member.name: (member.offset_data, member.size) for member in tar}
        for entry in self._entries:
            for kind, member in entry["members"].items():
                member["name"] = f"{entry['key']}.{kind}"
                member["offset"], member["size"] = places[member["name"]]
            place_tensors(entry)
        with open(partial, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        index = {
            "shard_version": SHARD_VERSION,
            "shard": self.tar_name,
            "bytes": partial.stat().st_size,
            "extractors": tags_of(self._extractors),
            "samples": self._entries,
        }
        return publish_shard(self._root, index, digest)

    def abandon(self) -> None:
        """Give the file handle back without publishing."""
        for file in (self._tar, self._file):
            with suppress(OSError):  # closing writes what is buffered, for which a full disk has no room
                file.close()


def place_tensors(entry: dict[str, Any]) -> None:
    """Turn offsets within the safetensors member (`tensor_table`) into offsets in the tar."""
    for tensor in entry["tensors"].values():
        tensor["offset"] += entry["members"]["safetensors"]["offset"]


def publish_shard(root: Path, index: Mapping[str, Any], digest: str) -> dict[str, dict[str, Any]]:
    """Give the finished partial tar its name and write the index beside it; size and sha256 of both by name."""
    tar_name, index_name = index["shard"], index_name_of(index["shard"])
    data = encode_json(index, index_name)
    # As a reader will see it: a set that no reader accepts must not be published.
    check_index(parse_json(data, index_name), tar_name, index_name)
    os.replace(root / (tar_name + PARTIAL), root / tar_name)
    publish(root / index_name, data)
    return {
        tar_name: {"bytes": index["bytes"], "sha256": digest},
        index_name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
    }


def remove_own_files(root: Path) -> None:
    """Remove the shards in `root`, finished and partial: of a build that wrote no manifest."""
    for path in root.iterdir():
        if _OWN_FILE.fullmatch(path.name):
            path.unlink()
