"""Small shard sets of named people, for tests of what looks at sets and changes them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from helpers.fake_shards import fake_extractors, fake_sample

from data_shards.reader import ShardSet
from data_shards.schema import ClipSample
from data_shards.writer import ShardSetWriter


def write_people(
    root: Path,
    *,
    train: Sequence[str] = ("ann", "bob"),
    validation: Sequence[str] = ("cyd",),
    clips: int = 2,
    frames: int = 3,
    rejected: Sequence[dict[str, Any]] = (),
    info: dict[str, Any] | None = None,
    shard_bytes: int = 10**9,
    motion_tag: str = "random-motion-v1",
    sources: Mapping[str, str] | None = None,
    **streams: Any,
) -> Path:
    """`clips` clips of every person: keys "ann-w0", "ann-w1", ..., identity "ann", source "ann.mp4" or that of
    `sources`. Returns `root`."""
    extractors = fake_extractors(**streams)
    extractors["motion"]["tag"] = motion_tag
    with ShardSetWriter(root, extractors, shard_bytes=shard_bytes) as writer:
        for split, people in (("train", train), ("validation", validation)):
            for person in people:
                for number in range(clips):
                    clip = person_clip(person, number, extractors, frames)
                    source = (sources or {}).get(person, f"{person}.mp4")
                    writer.add(split, replace(clip, meta={**clip.meta, "source": source}))
        writer.finish(list(rejected), info or {})
    return root


def person_clip(person: str, number: int, extractors: dict[str, dict[str, Any]], frames: int) -> ClipSample:
    """The same numbers for the same person and number, whatever set it goes to."""
    key = f"{person}-w{number}"
    clip = fake_sample(key, person, extractors, frames=frames, seed=zlib.crc32(key.encode()))
    return replace(clip, meta={**clip.meta, "window": number})


def read_clips(root: Path) -> dict[str, list[ClipSample]]:
    """Every clip of a set, by split."""
    opened = ShardSet.open(root)
    readers = {name: opened.split(name) for name in ("train", "validation")}
    return {name: [reader.read(index) for index in range(len(reader))] for name, reader in readers.items()}


def file_bytes(root: Path) -> dict[str, bytes]:
    """Content of every file of a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(root.iterdir())}
