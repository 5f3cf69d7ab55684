"""The time from opening a large shard set to its first batch, in fresh processes."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from data_shards.files import encode_json, publish
from data_shards.layout import header_text, parse_layout
from data_shards.manifest import sealed
from data_shards.reader import ShardSet
from data_shards.schema import RECORD_VERSION, ClipSample, ShardError, tags_of
from data_shards.shard import Shard, publish_index
from data_shards.writer import ShardSetWriter

BATCH = 8
REPEATS = 5
FRAMES = 21
PEOPLE = 20  # clips of one identity
_EXTRACTORS: dict[str, dict[str, Any]] = {
    "video": {"tag": "bench-video-v1", "channels": 16, "height": 1, "width": 1},
    "motion": {"tag": "bench-motion-v1", "width": 4},
    "audio": {"tag": "bench-audio-v1", "width": 4, "hz": 50},
}


def first_batch_rows(root: Path, tars: int, clips: int) -> list[dict[str, Any]]:
    """Milliseconds of opening and of the first batch of 8 random clips, the median process of five; with the files of
    the set in memory, and not (where the system can be told to drop them). Makes the set if `root` is absent.

    Raises ShardError for a set of other numbers.
    """
    if not root.exists():
        make_set(root, tars, clips)
    listed = ShardSet.open(root).manifest["splits"]["train"]
    if (len(listed["shards"]), listed["samples"]) != (tars, tars * clips):
        found = f"{listed['samples']} clips in {len(listed['shards'])} tars"
        raise ShardError(f"{root}: {found}: expected {tars * clips} in {tars} (or a folder that does not exist)")
    rows = []
    for name, dropped in (("files in memory", False), ("files not in memory", True)):
        if dropped and not hasattr(os, "posix_fadvise"):
            continue
        found_rows = []
        for _ in range(REPEATS):
            if dropped:
                _drop(root)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found_rows.append(pool.apply(_first_batch, (root,)))
        found_rows.sort(key=lambda row: row["first batch ms"])
        rows.append({"row": name, **found_rows[REPEATS // 2]})
    return rows


def make_set(root: Path, tars: int, clips: int) -> None:
    """A set of `tars` tars of `clips` clips each, by the parts of the writer: one small clip under many keys."""
    root.mkdir(parents=True)
    clip = _clip()
    payload = save({name: value.clone() for name, value in clip.tensors().items()})
    layout = parse_layout(header_text(payload, str(root)), _EXTRACTORS, str(root))
    files: dict[str, Any] = {}
    shards: list[Shard] = []
    identities: list[str] = []
    for number in range(tars):
        shard = Shard(root, f"train-{number:06d}")
        for place in range(clips):
            identity = f"person-{(number * clips + place) // PEOPLE:08d}"
            if not identities or identities[-1] != identity:
                identities.append(identity)
            one = replace(clip, key=f"{number:06d}-{place:06d}-window-0000", identity=identity)
            shard.add(one.key, identity, _record(one), payload, layout)
        files |= shard.close()
        shards.append(shard)
    names = {"train": identities, "validation": []}
    layouts, index = publish_index(root, {"train": [shard.clips for shard in shards], "validation": []}, names)
    with _template(root, clip) as template:
        listed = {"shards": [shard.tar_name for shard in shards], "samples": tars * clips, "identities": identities}
        splits = {**template["splits"], "train": listed}
        made = {**template, "splits": splits, "files": {**files, **index}, "layouts": layouts}
        publish(root / "manifest.json", sealed(made, str(root))[1])


@contextmanager
def _template(root: Path, clip: ClipSample) -> Iterator[dict[str, Any]]:
    """The manifest that the writer gives a set of this one clip, which is gone at the end."""
    folder = root / "one"
    with ShardSetWriter(folder, _EXTRACTORS) as writer:
        writer.add("train", clip)
        yield writer.finish([], {"tool": "bench_reader"})
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def _clip() -> ClipSample:
    generator = torch.Generator().manual_seed(0)
    struct, audio = (torch.randn(FRAMES, count, 4, generator=generator) for count in (4, 8))
    struct[0], audio[0, :7] = struct[0, :1], audio[0, :1]
    video = torch.randn(FRAMES, 16, 1, 1, generator=generator).half()
    return ClipSample(
        key="key", identity="person", video=video, reference=video[0].clone(), struct=struct, audio=audio.half(),
        voiced=torch.ones(FRAMES, dtype=torch.bool), flame=None, flame_valid=None, text=None, meta={"source": "bench"},
    )  # fmt: skip


def _record(clip: ClipSample) -> bytes:
    record = {"shard_version": RECORD_VERSION, "key": clip.key, "identity": clip.identity, "frames": clip.frames,
              "extractors": tags_of(_EXTRACTORS), "meta": clip.meta}  # fmt: skip
    return encode_json(record, clip.key)


def _drop(root: Path) -> None:
    """Ask the system to forget the contents of the files; what it knows of the folder stays."""
    for entry in os.scandir(root):
        handle = os.open(entry.path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _first_batch(root: Path) -> dict[str, float]:
    before, began, work = _resident(), time.perf_counter(), time.process_time()
    reader = ShardSet.open(root).split("train")
    opened = time.perf_counter()
    for index in random.Random(0).sample(range(len(reader)), BATCH):
        reader.read(index)
    ended = time.perf_counter()
    return {
        "open ms": 1000 * (opened - began),
        "first batch ms": 1000 * (ended - began),
        "cpu ms": 1000 * (time.process_time() - work),
        "more MB": _resident() - before,
    }


def _resident() -> float:
    """Megabytes that are resident now; 0 where the system does not tell."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * resource.getpagesize() / 2**20 if path.exists() else 0.0
