"""index.safetensors: key, identity, layout, record size and checksum of every clip of a set, as columns of numbers.

With the layouts of the manifest this says where every byte of every clip lies, since tars have nothing between their
members. All of it is checked at the speed of arrays when a set is opened. The checksums of a clip's frames are its row
in TAR's `.sums.safetensors`, of which the index has the checksum; a row is read and checked with its clip.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest

from data_shards.columns import Column, Form, decode_columns, encode_columns, size_of
from data_shards.files import Folder
from data_shards.layout import Layout
from data_shards.schema import KEY_CHARACTERS, MAX_KEY, MAX_RECORD_BYTES, SPLITS, ShardError, check_key, fail, shown

INDEX_NAME = "index.safetensors"
TAR_BLOCK = 512
TAR_RECORD = 20 * TAR_BLOCK  # a tar ends with two empty blocks and is filled up to a whole record
MAX_CLIPS = 2**20  # of a set
MAX_TARS = 2**16
MAX_INDEX_BYTES = 2**26
_CHUNK = 4096  # keys that exist as texts at a time
_LINE_END = 10


class Place(NamedTuple):
    """Where a clip lies: the tar, the byte at which its first tar header begins, the size of its JSON member, the
    layout of its safetensors member; `row` is its place among the clips of the tar, `sum` the checksum of that row."""

    tar: str
    key: str
    identity: str
    start: int
    record_bytes: int
    layout: Layout
    row: int
    rows: int
    sum: int


class ClipFacts(NamedTuple):
    """What the index says of one clip: `layout` and `identity` as numbers, of the manifest's lists."""

    key: str
    identity: int
    layout: int
    record_bytes: int
    sum: int


@dataclass(frozen=True)
class SetIndex:
    """A checked index. `first` has the number of the first clip of each tar, and the number of all clips at the end;
    `identities` is the manifest's list of each clip's split; `starts` [N] is the place of every clip in its tar."""

    tars: tuple[str, ...]
    first: tuple[int, ...]
    columns: Mapping[str, Column]
    key_ends: Column  # [N] uint32: the line end behind each key
    starts: Column  # [N] int64
    layouts: tuple[Layout, ...]
    identities: Mapping[str, Sequence[str]]
    train: int  # clips of the first split, which come first

    def __len__(self) -> int:
        return len(self.starts)

    def key(self, clip: int) -> str:
        """Key of a clip."""
        ends = self.key_ends
        start = ends.item(clip - 1) + 1 if clip else 0
        return self.columns["keys"][start : ends.item(clip)].tobytes().decode("ascii")

    def keys(self, start: int, stop: int) -> list[str]:
        """Keys of the clips `start` to `stop` - 1."""
        return [key.decode("ascii") for key in _key_bytes(self.columns["keys"], self.key_ends, start, stop)]

    def identity(self, clip: int) -> str:
        """Identity of a clip."""
        return self.identities[SPLITS[clip >= self.train]][self.columns["identity"].item(clip)]

    def place(self, clip: int) -> Place:
        """All that reading a clip needs."""
        number = bisect_right(self.first, clip) - 1
        columns, first = self.columns, self.first[number]
        return Place(
            tar=self.tars[number],
            key=self.key(clip),
            identity=self.identity(clip),
            start=self.starts.item(clip),
            record_bytes=columns["record_bytes"].item(clip),
            layout=self.layouts[columns["layout"].item(clip)],
            row=clip - first,
            rows=self.first[number + 1] - first,
            sum=columns["sums"].item(clip),
        )


def index_forms(clips: int, key_bytes: int, tars: int) -> dict[str, Form]:
    """Columns of an index: `sums` of rows, `identity`, `record_bytes`, `clips` of each tar, `layout`, and `keys`, each
    with a line end behind it."""
    return {
        "sums": ("U64", (clips,)),
        "identity": ("U32", (clips,)),
        "record_bytes": ("U32", (clips,)),
        "clips": ("U32", (tars,)),
        "layout": ("U8", (clips,)),
        "keys": ("U8", (key_bytes,)),
    }


def sums_forms(clips: int, words: int) -> dict[str, Form]:
    """The one column of the checksums beside a tar."""
    return {"xxh3_64": ("U64", (clips, words))}


def encode_index(clips: Sequence[ClipFacts], per_tar: Sequence[int]) -> bytes:
    """The index of these clips, in the order of `per_tar`, the number of clips of each tar."""
    keys = "".join(f"{clip.key}\n" for clip in clips).encode("ascii")
    columns: dict[str, Any] = {
        "sums": [clip.sum for clip in clips],
        "identity": [clip.identity for clip in clips],
        "record_bytes": [clip.record_bytes for clip in clips],
        "clips": per_tar,
        "layout": [clip.layout for clip in clips],
        "keys": np.frombuffer(keys, np.uint8),
    }
    return encode_columns(index_forms(len(clips), len(keys), len(per_tar)), columns)


def decode_index(data: bytes, manifest: Mapping[str, Any], layouts: Sequence[Layout], source: Folder) -> SetIndex:
    """The index that fits the manifest, of which the form has been checked; ShardError names the clip or tar at fault.

    Checked: keys are well formed and unique, identities are those of the manifest, each in one split and each with a
    clip, records are within the limit, layouts exist, and each tar is as large as its clips make it.
    """
    origin, splits = source.label(INDEX_NAME), [manifest["splits"][name] for name in SPLITS]
    samples = [int(split["samples"]) for split in splits]
    tars = [name for split in splits for name in split["shards"]]
    if sum(samples) > MAX_CLIPS or len(tars) > MAX_TARS:
        value = f"{sum(samples)} samples in {len(tars)} shards"
        raise ShardError(f"{origin}: {value}: expected at most {MAX_CLIPS} in {MAX_TARS}")
    fixed = size_of(index_forms(sum(samples), 0, len(tars)))
    what = f"{sum(samples)} samples in {len(tars)} shards, as in the manifest"
    columns = decode_columns(data, index_forms(sum(samples), max(0, len(data) - fixed), len(tars)), origin, what)
    per_tar = columns["clips"].astype(np.int64)
    _check_counts(per_tar, splits, tars, source)
    spans = _spans(columns, layouts, origin)
    ends = np.concatenate([np.zeros(1, np.int64), spans.cumsum()])  # of clips, as if there were one tar
    first = np.concatenate([np.zeros(1, np.int64), per_tar.cumsum()])
    index = SetIndex(
        tars=tuple(tars),
        first=tuple(first.tolist()),
        columns=columns,
        key_ends=_key_ends(columns["keys"], sum(samples), origin),
        starts=ends[:-1] - np.repeat(ends[first[:-1]], per_tar),
        layouts=tuple(layouts),
        identities={name: split["identities"] for name, split in zip(SPLITS, splits, strict=True)},
        train=samples[0],
    )
    _check_tars(np.diff(ends[first]), manifest, tars, source)
    _check_unique(index, source)
    _check_identities(index, source)
    return index


def rounded_up(size: Any, block: int) -> Any:
    """`size` (a number or an array), filled up to whole blocks."""
    return -(-size // block) * block


def _check_counts(per_tar: Column, splits: Sequence[Mapping[str, Any]], tars: Sequence[str], source: Folder) -> None:
    origin = source.label("manifest.json")
    if len(tars) and not per_tar.min():
        raise ShardError(f"{source.label(INDEX_NAME)}: clips: 0 of {tars[int(per_tar.argmin())]}: expected at least 1")
    start = 0
    for name, split in zip(SPLITS, splits, strict=True):
        stop = start + len(split["shards"])
        count = int(per_tar[start:stop].sum())
        if count != split["samples"]:
            raise ShardError(f"{origin}: splits.{name}.samples: {split['samples']}: expected {count}, the index's")
        start = stop


def _spans(columns: Mapping[str, Column], layouts: Sequence[Layout], origin: str) -> Column:
    """[N] bytes of each clip in its tar: two tar headers, and two members filled up to whole blocks."""
    records, numbers = columns["record_bytes"].astype(np.int64), columns["layout"]
    for name, column, most in (("record_bytes", records, MAX_RECORD_BYTES), ("layout", numbers, len(layouts) - 1)):
        if len(column) and column.max() > most:
            clip = int(column.argmax())
            raise ShardError(f"{origin}: {name}[{clip}]: {column[clip]}: expected at most {most}")
    sizes = np.array([rounded_up(layout.size, TAR_BLOCK) for layout in layouts], np.int64)
    return 2 * TAR_BLOCK + rounded_up(records, TAR_BLOCK) + sizes[numbers]


def _check_tars(contents: Column, manifest: Mapping[str, Any], tars: Sequence[str], source: Folder) -> None:
    sizes = rounded_up(contents + 2 * TAR_BLOCK, TAR_RECORD).tolist()
    for name, size in zip(tars, sizes, strict=True):
        listed, found = manifest["files"][name]["bytes"], source.size(name)
        if found != size:
            label = source.label(name)
            raise ShardError(f"{label}: {found} bytes: expected {size}, those of its clips (truncated or changed)")
        if listed != size:
            field = f"{source.label('manifest.json')}: files.{name}.bytes"
            raise ShardError(f"{field}: {listed}: expected {size}, the tar's")


def _key_ends(keys: Column, count: int, origin: str) -> Column:
    lines = int(np.count_nonzero(keys == _LINE_END))
    if lines != count or (len(keys) and keys[-1] != _LINE_END):
        raise ShardError(f"{origin}: keys: {lines} lines: expected {count} whole lines, one for each clip")
    ends = np.flatnonzero(keys == _LINE_END)
    lengths = np.diff(ends, prepend=-1) - 1
    allowed = np.zeros(256, bool)
    allowed[[_LINE_END, *KEY_CHARACTERS]] = True
    good = allowed[keys]
    if count and not (good.all() and lengths.min() >= 1 and lengths.max() <= MAX_KEY):
        wrong = (lengths < 1) | (lengths > MAX_KEY)
        clip = int(wrong.argmax()) if wrong.any() else int(np.searchsorted(ends, good.argmin()))
        start = int(ends[clip] - lengths[clip])
        check_key(keys[start : int(ends[clip])].tobytes().decode("ascii", "backslashreplace"), origin)
    return ends.astype(np.uint32)


def _check_unique(index: SetIndex, source: Folder) -> None:
    keys, count = index.columns["keys"], len(index)
    digests = np.fromiter(
        (
            xxh3_64_intdigest(key)
            for start in range(0, count, _CHUNK)
            for key in _key_bytes(keys, index.key_ends, start, min(start + _CHUNK, count))
        ),
        np.uint64,
        count,
    )
    order = digests.argsort(kind="stable")
    ranked = digests[order]
    again = order[1:][ranked[1:] == ranked[:-1]].tolist()  # clips whose digest an earlier one has
    if not again:
        return
    alike = order[np.isin(ranked, digests[again])].tolist()
    seen: set[str] = set()
    for clip in sorted(alike):  # chance or malice can make digests equal, so the keys decide
        place = index.place(clip)
        if place.key in seen:
            origin = source.label(place.tar)
            raise fail(origin, place.key, "key", place.key, "a key that no other clip of the set has")
        seen.add(place.key)


def _check_identities(index: SetIndex, source: Folder) -> None:
    origin, start = source.label("manifest.json"), 0
    seen: dict[str, str] = {}
    for split, names in index.identities.items():
        # In order, so that a name put in or taken out does not give the clips of its neighbours to others unseen.
        if any(not name for name in names) or list(names) != sorted(names):
            raise ShardError(f"{origin}: splits.{split}.identities: {shown(names)}: expected names in order")
        for name in names:
            if seen.setdefault(name, split) != split:
                raise ShardError(
                    f"{origin}: splits.{split}.identities: {shown(name)}: expected one that is not in {seen[name]}"
                )
        stop = index.train if split == SPLITS[0] else len(index)
        numbers = index.columns["identity"][start:stop]
        if len(numbers) and numbers.max() >= len(names):
            clip = start + int(numbers.argmax())
            expected = f"one of the {len(names)} that the manifest lists under splits.{split}"
            raise fail(source.label(INDEX_NAME), index.key(clip), "identity", f"number {numbers.max()}", expected)
        unused = np.flatnonzero(np.bincount(numbers, minlength=len(names)) == 0)
        if len(unused):
            name = shown(names[int(unused[0])])
            raise ShardError(f"{origin}: splits.{split}.identities: {name}: expected one that has a clip")
        start = stop


def _key_bytes(keys: Column, ends: Column, start: int, stop: int) -> list[bytes]:
    if start >= stop:
        return []
    begin = int(ends[start - 1]) + 1 if start else 0
    return keys[begin : int(ends[stop - 1])].tobytes().split(b"\n")
