"""One tar that is being written and the checksums beside it, the index of all, and what an interrupted build leaves."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from webdataset.writer import TarWriter
from xxhash import xxh3_64_intdigest

from data_shards.columns import encode_columns
from data_shards.files import PARTIAL, publish
from data_shards.index import INDEX_NAME, TAR_BLOCK, ClipFacts, encode_index, rounded_up, sums_forms
from data_shards.layout import Layout, pack_row, row_of
from data_shards.manifest import MANIFEST_NAME, sums_name_of
from data_shards.schema import SPLITS, ShardError, shown

_STEM = rf"(?:{'|'.join(SPLITS)})-[0-9]{{6}}"
_OWN_FILE = re.compile(
    rf"(?:{_STEM}\.(?:tar|sums\.safetensors|index\.json)|{re.escape(INDEX_NAME)})(?:{re.escape(PARTIAL)})?"
    rf"|{re.escape(MANIFEST_NAME)}{re.escape(PARTIAL)}"
)


class Written(NamedTuple):
    """What the index keeps of a clip that is in a tar, and its `row` of checksums until they are beside the tar."""

    key: str
    identity: str
    layout: Layout
    record_bytes: int
    sum: int
    row: bytes


def written(key: str, identity: str, record: bytes | bytearray, payload: bytes | bytearray, layout: Layout) -> Written:
    """Of a clip with these two members."""
    row = pack_row(row_of(record, payload, layout))
    return Written(key, identity, layout, len(record), xxh3_64_intdigest(row), row)


def without_rows(clips: Sequence[Written]) -> list[Written]:
    """The clips of a tar whose checksums are written: most of what is held of a clip, which all the clips of a set
    together would make a gigabyte."""
    return [clip._replace(row=b"") for clip in clips]


class Shard:
    """One tar that is being written."""

    def __init__(self, root: Path, stem: str) -> None:
        self.tar_name = f"{stem}.tar"
        self.bytes = 0
        self.clips: list[Written] = []
        self._root = root
        self._file: BinaryIO = open(root / (self.tar_name + PARTIAL), "wb")  # noqa: SIM115 - closed in close()
        # A fixed time and owner: the same clips give the same bytes on every machine.
        self._tar = TarWriter(self._file, user="dualforce", group="dualforce", mtime=0, encoder=False, compress=False)

    def add(self, key: str, identity: str, record: bytes, payload: bytes, layout: Layout) -> None:
        """Append a clip, encoded as its two members."""
        self._tar.write({"__key__": key, "safetensors": payload, "json": record})
        self.bytes += len(payload) + len(record)
        self.clips.append(written(key, identity, record, payload, layout))

    def close(self) -> dict[str, dict[str, Any]]:
        """Publish the tar and its checksums; size and sha256 of both by name."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        partial = self._root / (self.tar_name + PARTIAL)
        check_places(partial, self.clips)
        with open(partial, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        made = publish_shard(self._root, self.tar_name, self.clips, digest)
        self.clips = without_rows(self.clips)
        return made

    def abandon(self) -> None:
        """Give the file handle back without publishing."""
        for file in (self._tar, self._file):
            with suppress(OSError):  # closing writes what is buffered, for which a full disk has no room
                file.close()


def check_places(tar_path: Path, clips: Sequence[Written]) -> None:
    """ShardError unless the members of a tar are those of the clips, each where readers will look for it."""
    with tarfile.open(tar_path, "r:") as tar:
        found = [(member.name, member.offset_data, member.size) for member in tar]
    expected, end = [], 0
    for clip in clips:
        for kind, size in (("json", clip.record_bytes), ("safetensors", clip.layout.size)):
            expected.append((f"{clip.key}.{kind}", end + TAR_BLOCK, size))
            end += TAR_BLOCK + rounded_up(size, TAR_BLOCK)
    if found != expected:
        pairs = itertools.zip_longest(found, expected, fillvalue=None)
        number, real, wanted = next((i, *pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ShardError(f"{tar_path}: member {number}: {shown(real)}: expected {wanted}, in sequence")


def publish_shard(root: Path, tar_name: str, clips: Sequence[Written], digest: str) -> dict[str, dict[str, Any]]:
    """Give the finished partial tar its name and write the checksums beside it; size and sha256 of both by name."""
    words, rows = clips[0].layout.words, b"".join(clip.row for clip in clips)
    forms = sums_forms(len(clips), words)
    data = encode_columns(forms, {"xxh3_64": np.frombuffer(rows, "<u8")})
    partial = root / (tar_name + PARTIAL)
    size = partial.stat().st_size
    os.replace(partial, root / tar_name)
    publish(root / sums_name_of(tar_name), data)
    return {
        tar_name: {"bytes": size, "sha256": digest},
        sums_name_of(tar_name): {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
    }


def publish_index(
    root: Path, shards: Mapping[str, Sequence[Sequence[Written]]], identities: Mapping[str, Sequence[str]]
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Write the index of the clips of all shards of each split; the manifest's layouts, and size and sha256 by name.

    `identities` are those of each split, in order. Layouts are put in order too, so that the same clips give the same
    index however they came together.
    """
    texts = sorted({clip.layout.text for shard in _all(shards) for clip in shard})
    number_of = {text: number for number, text in enumerate(texts)}
    facts = []
    for split in SPLITS:
        numbers = {name: number for number, name in enumerate(identities[split])}
        for clip in (clip for shard in shards[split] for clip in shard):
            layout = number_of[clip.layout.text]
            facts.append(ClipFacts(clip.key, numbers[clip.identity], layout, clip.record_bytes, clip.sum))
    data = encode_index(facts, [len(shard) for shard in _all(shards)])
    publish(root / INDEX_NAME, data)
    return texts, {INDEX_NAME: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}


def own_files(root: Path) -> list[Path]:
    """What has the name of a shard, finished or partial, in `root`, in order; its manifest is none of them."""
    return sorted(path for path in root.iterdir() if _OWN_FILE.fullmatch(path.name))


def remove_own_files(root: Path) -> None:
    """Remove the shards in `root`, finished and partial, whoever made them: for a caller who knows that none is of
    others."""
    for path in own_files(root):
        path.unlink()


def _all(shards: Mapping[str, Sequence[Sequence[Written]]]) -> Iterable[Sequence[Written]]:
    return (shard for split in SPLITS for shard in shards[split])
