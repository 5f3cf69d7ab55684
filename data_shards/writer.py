"""ClipSample -> tar shards, their checksums, the index and the manifest.

Every file is written under a temporary name, flushed to the disk and renamed; the manifest comes last, so a folder with
a manifest is complete. Equal samples in equal order give equal bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save as encode_tensors

from data_shards.claim import Claim
from data_shards.columns import size_of
from data_shards.files import encode_json, parse_json, publish, sync_folder
from data_shards.index import MAX_CLIPS, MAX_INDEX_BYTES, MAX_TARS, index_forms
from data_shards.layout import Layout, header_text, parse_layout
from data_shards.manifest import NOT_LISTED, Room, listed, sealed
from data_shards.moments import StreamMoments
from data_shards.schema import (
    FPS,
    MAX_CLIP_BYTES,
    MAX_RECORD_BYTES,
    PIXELS_PER_LATENT,
    RECORD_VERSION,
    SHARD_VERSION,
    SPLITS,
    ClipSample,
    ShardError,
    check_extractors,
    fail,
    tags_of,
    validate,
)
from data_shards.shard import Shard, publish_index


class ShardSetWriter:
    """Writes one shard set into `root`, which must not hold one already.

    `extractors` is the table of README.md; `shard_bytes` is the size at which the next tar starts. Use it as a context
    manager to have what was written removed when the block ends without `finish`. What a killed writer left in `root`
    is removed at the start, other files never (`claim.Claim`).
    Raises ShardError for a set or shards of others in `root`, a sample outside the contract, a key used twice, an
    identity in two splits, or a clip whose length (or number of text tokens) differs from the first one's.
    """

    def __init__(self, root: Path, extractors: dict[str, dict[str, Any]], *, shard_bytes: int = 10**9) -> None:
        check_extractors(extractors, str(root))
        if shard_bytes < 1:
            raise ShardError(f"{root}: shard_bytes: {shard_bytes}: expected at least 1")
        root.mkdir(parents=True, exist_ok=True)
        self._claim = Claim(root)
        self._root = root
        self._extractors = extractors
        self._shard_bytes = shard_bytes
        self._open: dict[str, Shard] = {}
        self._shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
        self._layouts: dict[str, Layout] = {}
        self._key_bytes = 0
        self._room = Room()
        self._files: dict[str, dict[str, Any]] = {}
        self._samples = dict.fromkeys(SPLITS, 0)
        self._split_of: dict[str, str] = {}
        self._keys: set[str] = set()
        self._lengths: tuple[int, int | None] | None = None
        self._moments = StreamMoments()
        self._finished = False

    def __enter__(self) -> ShardSetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for shard in self._open.values():
            shard.abandon()
        if not self._finished:
            self._claim.clear()

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
        for name, data, most in (("safetensors", payload, MAX_CLIP_BYTES), ("json", record, MAX_RECORD_BYTES)):
            if len(data) > most:
                raise fail(str(self._root), sample.key, name, f"{len(data)} bytes", f"at most {most}")
        shard = self._open.get(split)
        if shard is not None and shard.bytes + len(payload) + len(record) > self._shard_bytes:
            self._close(split)
            shard = None
        if shard is None:
            stem = f"{split}-{len(self._shards[split]):06d}"
            self._claim.add(stem)
            shard = Shard(self._root, stem)
            self._open[split] = shard
            self._shards[split].append(shard)
        shard.add(sample.key, sample.identity, record, payload, self._layout(payload, sample.key))
        self._keys.add(sample.key)
        self._key_bytes += len(sample.key) + 1
        if sample.identity not in self._split_of:
            self._room = self._room.plus(sample.identity)
        self._split_of[sample.identity] = split
        self._samples[split] += 1
        if split == "train":
            self._moments.add(sample)

    def finish(self, rejected: Sequence[Mapping[str, Any]], info: Mapping[str, Any]) -> dict[str, Any]:
        """Close the shards, write manifest.json and return it.

        `rejected` lists sources that gave no clip ({"source", "reason", "detail"}), `info` is any JSON object about the
        build. Of rejections for which a manifest has no room the numbers by reason are added to `info`.
        Raises ShardError when the train split is empty, or another process has begun to write in the folder.
        """
        if not self._samples["train"] or self._lengths is None:
            raise ShardError(f"{self._root}: train: 0 samples: expected at least 1 clip to train on")
        self._claim.check()
        for split in list(self._open):
            self._close(split)
        splits = {split: self._describe(split) for split in SPLITS}
        shards = {split: [shard.clips for shard in self._shards[split]] for split in SPLITS}
        identities = {split: splits[split]["identities"] for split in SPLITS}
        layouts, files = publish_index(self._root, shards, identities)
        manifest = {
            "shard_version": SHARD_VERSION,
            "extractors": self._extractors,
            "fps": FPS,
            "pixel_size": PIXELS_PER_LATENT * self._extractors["video"]["height"],
            "frames": self._lengths[0],
            "splits": splits,
            "files": {**self._files, **files},
            "layouts": layouts,
            "statistics": self._moments.statistics(str(self._root)),
            "info": info,
        }
        manifest["rejected"], more = listed(rejected, manifest, str(self._root))
        if more:
            manifest["info"] = {**info, NOT_LISTED: dict(Counter(info.get(NOT_LISTED, {})) + Counter(more))}
        document, data = sealed(manifest, str(self._root / "manifest.json"))
        publish(self._root / "manifest.json", data)
        sync_folder(self._root)
        self._finished = True
        self._claim.release()
        return document

    def _check(self, split: str, sample: ClipSample) -> None:
        origin = str(self._root)
        if self._finished:
            raise ShardError(f"{origin}: add after finish: expected no more samples")
        if split not in SPLITS:
            raise fail(origin, sample.key, "split", split, " or ".join(SPLITS))
        validate(sample, origin, self._extractors)
        self._check_room(sample)
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

    def _check_room(self, sample: ClipSample) -> None:
        """Readers refuse a larger index, or manifest."""
        key = sample.key
        clips, tars = len(self._keys) + 1, sum(map(len, self._shards.values())) + 1
        size = size_of(index_forms(clips, self._key_bytes + len(key) + 1, tars))
        if clips > MAX_CLIPS or tars > MAX_TARS or size > MAX_INDEX_BYTES:
            value = f"{clips} clips in {tars} tars, {size} bytes"
            expected = f"at most {MAX_CLIPS}, {MAX_TARS} and {MAX_INDEX_BYTES}"
            raise fail(str(self._root), key, "index", value, expected)
        if sample.identity not in self._split_of:
            self._room.plus(sample.identity).check(tars, f"{self._root}: sample {key!r}")

    def _describe(self, split: str) -> dict[str, Any]:
        identities = sorted(name for name, where in self._split_of.items() if where == split)
        shards = [shard.tar_name for shard in self._shards[split]]
        return {"shards": shards, "samples": self._samples[split], "identities": identities}

    def _layout(self, payload: bytes, key: str) -> Layout:
        place = f"{self._root}: sample {key!r}: safetensors"
        text = header_text(payload, place)
        if text not in self._layouts:
            self._layouts[text] = parse_layout(text, self._extractors, place)
        return self._layouts[text]

    def _close(self, split: str) -> None:
        self._files.update(self._open.pop(split).close())


def _encode_record(sample: ClipSample, extractors: Mapping[str, Mapping[str, Any]], origin: str) -> bytes:
    record = {
        "shard_version": RECORD_VERSION,
        "key": sample.key,
        "identity": sample.identity,
        "frames": sample.frames,
        "extractors": tags_of(extractors),
        "meta": sample.meta,
    }
    origin = f"{origin}: sample {sample.key!r}: meta"
    data = encode_json(record, origin)
    parse_json(data, origin)  # refuses what a reader would refuse: too deep, too many values
    return data
