"""ClipSample -> tar shards, their indexes and the manifest.

Every file is written under a temporary name, flushed to the disk and renamed; the manifest comes last, so a folder with
a manifest is complete. Equal samples in equal order give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from safetensors.torch import save as encode_tensors
from webdataset.writer import TarWriter

from data_shards.moments import StreamMoments
from data_shards.schema import (
    FPS,
    PIXELS_PER_LATENT,
    SHARD_VERSION,
    SPLITS,
    ClipSample,
    ShardError,
    check_extractors,
    fail,
    tags_of,
    validate,
)

PARTIAL = ".partial"
_OWN_FILE = re.compile(rf"(?:{'|'.join(SPLITS)})-\d{{6}}\.(?:tar|index\.json)(?:{re.escape(PARTIAL)})?")


class ShardSetWriter:
    """Writes one shard set into `root`, which must not hold one already.

    `extractors` is the table of README.md; `shard_bytes` is the size at which the next tar starts. Use it as a context
    manager to have what was written removed when the block ends without `finish`. Shards that an interrupted build left
    in `root` (no manifest beside them) are removed at the start.
    Raises ShardError for a set that exists, a sample outside the contract, a key used twice, an identity in two splits,
    or a clip whose length (or number of text tokens) differs from the first one's.
    """

    def __init__(self, root: Path, extractors: dict[str, dict[str, Any]], *, shard_bytes: int = 10**9) -> None:
        check_extractors(extractors, str(root))
        if shard_bytes < 1:
            raise ShardError(f"{root}: shard_bytes: {shard_bytes}: expected at least 1")
        if (root / "manifest.json").exists():
            raise ShardError(f"{root / 'manifest.json'}: a shard set exists here: expected a new or empty folder")
        root.mkdir(parents=True, exist_ok=True)
        self._root = root
        self._extractors = extractors
        self._shard_bytes = shard_bytes
        self._open: dict[str, _Shard] = {}
        self._shards: dict[str, list[str]] = {split: [] for split in SPLITS}
        self._files: dict[str, dict[str, Any]] = {}
        self._samples = dict.fromkeys(SPLITS, 0)
        self._split_of: dict[str, str] = {}
        self._keys: set[str] = set()
        self._lengths: tuple[int, int | None] | None = None
        self._moments = StreamMoments()
        self._finished = False
        self._remove_own_files()

    def __enter__(self) -> ShardSetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for shard in self._open.values():
            shard.abandon()
        if not self._finished:
            self._remove_own_files()

    def add(self, split: str, sample: ClipSample) -> None:
        """Append `sample` to `split` ("train" or "validation"); the train split also enters the statistics."""
        self._check(split, sample)
        # Copies, because the format refuses tensors that share memory, as `reference` and `video[0]` may do.
        payload = encode_tensors(
            {
                name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, value in sample.tensors().items()
            }
        )
        record = _encode_record(sample, self._extractors, str(self._root))
        shard = self._open.get(split)
        if shard is not None and shard.bytes + len(payload) + len(record) > self._shard_bytes:
            self._close(split)
            shard = None
        if shard is None:
            shard = _Shard(self._root, f"{split}-{len(self._shards[split]):06d}", self._extractors)
            self._open[split] = shard
            self._shards[split].append(shard.tar_name)
        shard.add(sample, payload, record)
        self._keys.add(sample.key)
        self._split_of[sample.identity] = split
        self._samples[split] += 1
        if split == "train":
            self._moments.add(sample)

    def finish(self, rejected: list[dict[str, Any]], info: dict[str, Any]) -> dict[str, Any]:
        """Close the shards, write manifest.json and return it.

        `rejected` lists sources that gave no clip ({"source", "reason", "detail"}), `info` is any JSON object about the
        build. Raises ShardError when the train split is empty.
        """
        if not self._samples["train"] or self._lengths is None:
            raise ShardError(f"{self._root}: train: 0 samples: expected at least 1 clip to train on")
        for split in list(self._open):
            self._close(split)
        manifest = {
            "shard_version": SHARD_VERSION,
            "extractors": self._extractors,
            "fps": FPS,
            "pixel_size": PIXELS_PER_LATENT * self._extractors["video"]["height"],
            "frames": self._lengths[0],
            "splits": {split: self._describe(split) for split in SPLITS},
            "files": self._files,
            "statistics": self._moments.statistics(str(self._root)),
            "rejected": rejected,
            "info": info,
        }
        publish(self._root / "manifest.json", encode_json(manifest, str(self._root), indent=1))
        _sync_folder(self._root)
        self._finished = True
        return manifest

    def _check(self, split: str, sample: ClipSample) -> None:
        origin = str(self._root)
        if self._finished:
            raise ShardError(f"{origin}: add after finish: expected no more samples")
        if split not in SPLITS:
            raise fail(origin, sample.key, "split", split, " or ".join(SPLITS))
        validate(sample, origin, self._extractors)
        if sample.key in self._keys:
            raise fail(origin, sample.key, "key", sample.key, "a key that no other clip of the set has")
        other = self._split_of.get(sample.identity, split)
        if other != split:
            raise fail(origin, sample.key, "split", split, f"{other}, where identity {sample.identity!r} is")
        lengths = (sample.frames, None if sample.text is None else int(sample.text.shape[0]))
        self._lengths = self._lengths or lengths
        for name, value, expected in zip(("video", "text"), lengths, self._lengths, strict=True):
            if value != expected:
                raise fail(origin, sample.key, name, f"length {value}", f"{expected}, as in the set's first clip")

    def _describe(self, split: str) -> dict[str, Any]:
        identities = sorted(name for name, where in self._split_of.items() if where == split)
        return {"shards": self._shards[split], "samples": self._samples[split], "identities": identities}

    def _close(self, split: str) -> None:
        self._files.update(self._open.pop(split).close())

    def _remove_own_files(self) -> None:
        for path in self._root.iterdir():
            if _OWN_FILE.fullmatch(path.name):
                path.unlink()


class _Shard:
    """One tar that is being written, with the entries of its index."""

    def __init__(self, root: Path, stem: str, extractors: Mapping[str, Mapping[str, Any]]) -> None:
        self.tar_name = f"{stem}.tar"
        self.bytes = 0
        self._index_name = f"{stem}.index.json"
        self._root = root
        self._extractors = extractors
        self._entries: list[dict[str, Any]] = []
        self._file: BinaryIO = open(root / (self.tar_name + PARTIAL), "wb")  # noqa: SIM115 - closed in close()
        # A fixed time and owner: the same clips give the same bytes on every machine.
        self._tar = TarWriter(self._file, user="dualforce", group="dualforce", mtime=0, encoder=False, compress=False)

    def add(self, sample: ClipSample, payload: bytes, record: bytes) -> None:
        self._tar.write({"__key__": sample.key, "safetensors": payload, "json": record})
        self.bytes += len(payload) + len(record)
        members = {kind: {"crc32": zlib.crc32(data)} for kind, data in (("safetensors", payload), ("json", record))}
        tensors = {
            name: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            for name, value in sample.tensors().items()
        }
        entry = {"key": sample.key, "identity": sample.identity, "frames": sample.frames}
        self._entries.append({**entry, "members": members, "tensors": tensors})

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
        with open(partial, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = partial.stat().st_size
        index = {
            "shard_version": SHARD_VERSION,
            "shard": self.tar_name,
            "bytes": size,
            "extractors": tags_of(self._extractors),
            "samples": self._entries,
        }
        data = encode_json(index, self._index_name)
        os.replace(partial, self._root / self.tar_name)
        publish(self._root / self._index_name, data)
        return {
            self.tar_name: {"bytes": size, "sha256": digest},
            self._index_name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        }

    def abandon(self) -> None:
        """Give the file handle back without publishing."""
        self._tar.close()
        self._file.close()


def _encode_record(sample: ClipSample, extractors: Mapping[str, Mapping[str, Any]], origin: str) -> bytes:
    record = {
        "shard_version": SHARD_VERSION,
        "key": sample.key,
        "identity": sample.identity,
        "frames": sample.frames,
        "extractors": tags_of(extractors),
        "meta": sample.meta,
    }
    return encode_json(record, f"{origin}: sample {sample.key!r}: meta")


def encode_json(value: Any, origin: str, indent: int | None = None) -> bytes:
    """Strict JSON with sorted keys, hence the same bytes for the same value; ShardError if `value` is not JSON."""
    try:
        text = json.dumps(value, sort_keys=True, allow_nan=False, indent=indent)
    except (TypeError, ValueError) as error:
        raise ShardError(f"{origin}: {error}: expected plain JSON with finite numbers") from None
    return text.encode("utf-8") + b"\n"


def publish(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees all of it or nothing, also after a power cut."""
    partial = path.with_name(path.name + PARTIAL)
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _sync_folder(root: Path) -> None:
    # A rename is durable only when the folder itself is on the disk. Windows cannot open folders; it needs no sync.
    if os.name == "posix":
        handle = os.open(root, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
