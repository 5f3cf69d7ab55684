"""Shard set -> ClipSample, by byte range through the index of the set.

Nothing in a shard is executed: a member is either safetensors or JSON, and webdataset's decoders are not used. Every
byte that is read is checked: the index against the manifest, a clip's checksums against the index, its bytes against
these.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_shards.clip import read_prefix, read_whole
from data_shards.columns import Column, header_of, size_of
from data_shards.files import Folder
from data_shards.index import INDEX_NAME, MAX_INDEX_BYTES, TAR_BLOCK, SetIndex, decode_index, rounded_up, sums_forms
from data_shards.layout import Layout
from data_shards.manifest import MANIFEST_NAME, check_seal, read_layouts, read_manifest, set_hash, sums_name_of
from data_shards.plan import Plan, prefix_plan, whole_plan
from data_shards.rooms import Rooms
from data_shards.schema import SPLITS, ClipSample, ShardError, fail, tags_of


class ShardSet:
    """An opened shard set: `manifest` as it is on disk, its splits, and `source`, whose text names it in messages."""

    def __init__(self, source: Folder, manifest: dict[str, Any]) -> None:
        """The set in `source` with a manifest whose form has been checked; raises as `open` does."""
        self.manifest = manifest
        self.source = source
        self._index = _read_index(source, manifest)

    @property
    def root(self) -> Path:
        """The folder of the set; ShardError for one on a server."""
        return self.source.root

    @classmethod
    def open(cls, root: Path | Folder) -> ShardSet:
        """Read manifest and index of the set in folder `root`; checksums and tars are not read, but looked for (on a
        server when they are read).

        Raises ShardError for a missing or foreign manifest, another version, a missing file, anything but plain files,
        a file of another size (truncated), an index that changed, clips that do not fill their tars, layouts that are
        not of the set's extractors, a key used twice, an identity in two splits, or counts that do not add up.
        """
        source = root if isinstance(root, Folder) else Folder(root)
        manifest = read_manifest(source)
        source.expect(manifest)
        return cls(source, manifest)

    @property
    def hash(self) -> str:
        """64 hexadecimal digits that depend on the clips and their order alone (`manifest.set_hash`)."""
        return set_hash(self.manifest)

    @property
    def tokens(self) -> int:
        """E, text tokens of every clip; 0 without text."""
        return self._index.layouts[0].tokens

    @property
    def clip_sums(self) -> Column:
        """[N] uint64: checksum of the checksums of every clip, key and tags included; train first."""
        return self._index.columns["sums"]

    def key(self, clip: int) -> str:
        """Key of a clip, of all N."""
        return self._index.key(clip)

    def split(self, name: str) -> ShardReader:
        """Reader of "train" or "validation"; ShardError for another name."""
        if name not in SPLITS:
            raise ShardError(f"{self.source}: split: {name!r}: expected one of {', '.join(SPLITS)}")
        train = self._index.train
        clips = range(train) if name == SPLITS[0] else range(train, len(self._index))
        return ShardReader(self.source, self.manifest, self._index, clips)

    def verify(self) -> None:
        """Read every file to its end; ShardError names the first whose bytes are not those written."""
        check_seal(self.source)
        self._check_digest(INDEX_NAME)
        for number, tar in enumerate(self._index.tars):
            for name in (sums_name_of(tar), tar):
                self._check_digest(name)
            self._check_header(number)
        self.check_ends()

    def _check_digest(self, name: str) -> None:
        digest, expected = self.source.digest(name), self.manifest["files"][name]["sha256"]
        if digest != expected:
            raise ShardError(f"{self.source.label(name)}: sha256 {digest}: expected {expected}, the manifest's")

    def check_ends(self) -> None:
        """ShardError for a tar that does not end behind its last clip: other readers would see more members."""
        for number, tar in enumerate(self._index.tars):
            last = self._index.place(self._index.first[number + 1] - 1)
            members = rounded_up(last.record_bytes, TAR_BLOCK) + rounded_up(last.layout.size, TAR_BLOCK)
            end = last.start + 2 * TAR_BLOCK + members
            room = bytearray(self.manifest["files"][tar]["bytes"] - end)
            self.source.fill(tar, [(end, memoryview(room))])
            if room.strip(b"\0"):
                label = self.source.label(tar)
                raise ShardError(f"{label}: bytes behind the last member: expected zeros from {end} on")

    def _check_header(self, number: int) -> None:
        """The header of the checksums, which other readers of the file see."""
        name, first = sums_name_of(self._index.tars[number]), self._index.first
        header = header_of(sums_forms(first[number + 1] - first[number], self._index.layouts[0].words))
        room = bytearray(len(header))
        self.source.fill(name, [(0, memoryview(room))])
        if room != header:
            raise ShardError(f"{self.source.label(name)}: another header: expected that of one column of checksums")


class ShardReader:
    """The clips of one split, in the order in which they were written. Safe to use from several threads."""

    def __init__(self, source: Folder, manifest: Mapping[str, Any], index: SetIndex, clips: range) -> None:
        self.manifest = manifest
        self.source = source
        self._index = index
        self._clips = clips
        self._tags = tags_of(manifest["extractors"])
        self._rooms = Rooms()
        # Latent frames of each clip, and of its audio, whose values were found right. Bytes are checked against the
        # same checksums whenever they are read, so that the values of a clip are judged once.
        self._judged = [array("I", bytes(4 * len(clips))) for _ in ("all", "audio")]
        self._plans: dict[tuple[int, int, int], Plan] = {}

    def __len__(self) -> int:
        return len(self._clips)

    @property
    def root(self) -> Path:
        """The folder of the set; ShardError for one on a server."""
        return self.source.root

    @property
    def keys(self) -> list[str]:
        """Key of every clip."""
        return self._index.keys(self._clips.start, self._clips.stop)

    def key(self, index: int) -> str:
        """Key of one clip, without those of the others."""
        return self._index.key(self._clips[index])

    def identity(self, index: int) -> str:
        """Identity of one clip."""
        return self._index.identity(self._clips[index])

    @property
    def frames(self) -> int:
        """F, latent frames of every clip."""
        return int(self.manifest["frames"])

    def read(self, index: int, frames: int | None = None, beyond: int = 0) -> ClipSample:
        """Clip `index` (0 <= index < len), verified against index and contract.

        With `frames`, only the first `frames` latent frames: a crop, which is always a prefix. Its audio has `beyond`
        latent frames more, or as many as the clip has: windows with c frames (50 Hz) of context look beyond the crop
        and are those of the whole clip if `beyond` is at least c / 8, rounded up. Only these bytes, the clip's
        checksums and the JSON member are read, each frame under its own checksum; `frames` equal to F reads and checks
        the whole clip, tar headers included. The tensors share one piece of memory, which is the caller's own until
        the last of them is gone.
        Raises ShardError naming file, sample and field, of which it has `shard` and `member`, for damage of any kind or
        `frames` outside 1..F, IndexError for an index out of range, ValueError for a negative `beyond`.
        """
        if not 0 <= index < len(self._clips):
            raise IndexError(f"clip {index} of {self.source}: expected 0 to {len(self._clips) - 1}")
        if beyond < 0:
            raise ValueError(f"beyond: {beyond}: expected at least 0 latent frames")
        place = self._index.place(self._clips[index])
        most = place.layout.frames
        if frames is not None and not 1 <= frames <= most:
            origin = self.source.label(place.tar)
            raise fail(origin, place.key, "frames", frames, f"1 to {most}, the latent frames of the clip")
        if frames is None or frames == most:
            frames, beyond, read = most, 0, read_whole
        else:
            beyond, read = min(beyond, most - frames), read_prefix
        plan, tags, rooms = self._plan(place.layout, frames, beyond), self._tags, self._rooms
        judged, heard = self._judged
        known = judged[index] >= frames and heard[index] >= frames + beyond
        what = f"sample {place.key!r}: {place.key}.json and {place.key}.safetensors:"
        try:
            sample = self.source.checked(what, lambda source: read(source, place, tags, rooms, plan, known))
        except ShardError as error:
            error.shard = error.shard or place.tar
            raise
        if not known:
            judged[index] = max(judged[index], frames)
            heard[index] = max(heard[index], frames + beyond)
        return sample

    def _plan(self, layout: Layout, frames: int, beyond: int) -> Plan:
        key = (id(layout), frames, beyond)  # layouts are there as long as the index is
        if key not in self._plans:
            whole = frames == layout.frames
            self._plans[key] = whole_plan(layout) if whole else prefix_plan(layout, frames, beyond)
        return self._plans[key]


def _read_index(source: Folder, manifest: Mapping[str, Any]) -> SetIndex:
    layouts = read_layouts(manifest, source.label(MANIFEST_NAME))
    data, files = source.document(INDEX_NAME, MAX_INDEX_BYTES), manifest["files"]
    digest, expected = hashlib.sha256(data).hexdigest(), files[INDEX_NAME]["sha256"]
    if digest != expected:
        raise ShardError(f"{source.label(INDEX_NAME)}: sha256 {digest}: expected {expected}, the manifest's")
    index = decode_index(data, manifest, layouts, source)
    for number, tar in enumerate(index.tars):
        name, clips = sums_name_of(tar), index.first[number + 1] - index.first[number]
        size, found = size_of(sums_forms(clips, layouts[0].words)), source.size(name)
        if found != size:
            raise ShardError(f"{source.label(name)}: {found} bytes: expected {size}, the checksums of {clips} clips")
        if files[name]["bytes"] != size:
            listed = files[name]["bytes"]
            raise ShardError(f"{source.label(MANIFEST_NAME)}: files.{name}.bytes: {listed}: expected {size}")
    return index
