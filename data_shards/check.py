"""What is wrong with a shard set: every fault of its files and clips, and statistics that its clips do not have."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_shards.edit import Advance
from data_shards.files import Folder, parse_json
from data_shards.manifest import check_seal
from data_shards.moments import StreamMoments
from data_shards.reader import ShardSet
from data_shards.schema import SHARD_VERSION, SPLITS, ShardError, shown

_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")
ROUNDING = 1e-6  # of a channel's mean or deviation, whichever is larger; float64 sums differ by far less


@dataclass(frozen=True)
class Fault:
    """`text` is one line. `file` is the name of the faulty file, None if no single one is to blame; `sample` is the key
    of the faulty clip, None if the file is damaged outside clips or its clips were not read."""

    file: str | None
    sample: str | None
    text: str


@dataclass
class Findings:
    """All faults, and how much was looked at. `opened` is false if the set is too damaged to read clips from."""

    files: int = 0
    clips: int = 0
    opened: bool = True
    faults: list[Fault] = field(default_factory=list)


@dataclass(frozen=True)
class Difference:
    """The largest difference of one stream: where it is ("mean [1, 3]"), the values of manifest and clips, and whether
    it, or one at another place, is more than rounding. Without numbers to compare, `where` says why."""

    stream: str
    where: str
    stored: float
    computed: float
    differs: bool


def find_faults(
    root: Path, *, samples: bool = False, on_file: Advance = lambda done, total: None,
    on_clip: Advance = lambda done, total: None,
) -> Findings:  # fmt: skip
    """Check size and sha256 of every file of the manifest, with `samples` also every clip, and go on after a fault.

    A tar whose faulty clips are known is listed by them alone. `on_file` and `on_clip` are told how many are done, and
    of how many. Raises ShardError when there is no manifest of a shard set of this version.
    """
    found = Findings()
    manifest, opened, reason = _open(root)
    if opened is not None:
        # A manifest of another layout can be opened: someone may have written it anew. As written it is not.
        try:
            check_seal(Folder(root))
        except ShardError as error:
            found.faults.append(Fault("manifest.json", None, str(error)))
    for name, entry in manifest["files"].items():
        if not _FILE_NAME.fullmatch(name):
            place = f"{root / 'manifest.json'}: files: {name[:80]!r}"
            found.faults.append(Fault(None, None, f"{place}: expected the name of a file in the folder"))
        elif text := _file_fault(root / name, entry):
            found.faults.append(Fault(name, None, f"{root / name}: {text}"))
        found.files += 1
        on_file(found.files, len(manifest["files"]))
    if opened is None:
        found.opened = False
        if _file_of(reason, root, {fault.file for fault in found.faults}) is None:
            found.faults.append(Fault(None, None, reason))
    elif samples:
        clips = list(_clip_faults(opened, found, on_clip))
        blamed = {fault.file for fault in clips}
        found.faults = [fault for fault in found.faults if fault.file not in blamed] + clips
    return found


def compare_statistics(root: Path, *, on_clip: Advance = lambda done, total: None) -> list[Difference]:
    """The manifest's statistics beside those of the clips of the train split, one entry per stream."""
    opened = ShardSet.open(root)
    reader, moments = opened.split("train"), StreamMoments()
    for index in range(len(reader)):
        moments.add(reader.read(index))
        on_clip(index + 1, len(reader))
    stored, computed = opened.manifest["statistics"], moments.statistics(str(root))
    return [_compare(stream, stored.get(stream), computed.get(stream)) for stream in sorted({*stored, *computed})]


def _open(root: Path) -> tuple[dict[str, Any], ShardSet | None, str]:
    """The manifest; the set, or None and the reason why it cannot be opened."""
    try:
        opened = ShardSet.open(root)
        return opened.manifest, opened, ""
    except ShardError as error:
        path = root / "manifest.json"
        manifest = parse_json(Folder(root).document(path.name), str(path))
        if manifest.get("shard_version") != SHARD_VERSION or not isinstance(manifest.get("files"), dict):
            raise
        return manifest, None, str(error)


def _file_fault(path: Path, entry: Any) -> str | None:
    if not isinstance(entry, Mapping) or not {"bytes", "sha256"} <= set(entry):
        return None  # a fault of the manifest, which opening the set has found
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):  # before it is opened: a pipe would wait for ever
            return "expected a plain file, not a link, folder or pipe"
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
    except FileNotFoundError:
        return "missing: expected the file that manifest.json lists"
    except OSError as error:
        return f"{error.strerror}: expected a readable file"
    if size != entry["bytes"]:
        return f"{size} bytes: expected {entry['bytes']}, the manifest's"
    if digest != entry["sha256"]:
        return f"sha256 {digest}: expected {entry['sha256']}, the manifest's"
    return None


def _clip_faults(opened: ShardSet, found: Findings, on_clip: Advance) -> Iterator[Fault]:
    readers = [opened.split(name) for name in SPLITS]
    total = sum(map(len, readers))
    for reader in readers:
        for index, key in enumerate(reader.keys):
            try:
                reader.read(index)
            except ShardError as error:
                yield Fault(error.shard, key, str(error))
            found.clips += 1
            on_clip(found.clips, total)


def _file_of(text: str, root: Path, names: set[Any]) -> str | None:
    """The file with which a message begins."""
    return next((name for name in names if text.startswith(f"{root / str(name)}: ")), None)


def _compare(stream: str, stored: Any, computed: Any) -> Difference:
    nan = float("nan")
    if stored is None or computed is None:
        return Difference(stream, f"only in the {'manifest' if computed is None else 'clips'}", nan, nan, True)
    try:
        ours, theirs = ({key: _numbers(side[key]) for key in ("mean", "std")} for side in (stored, computed))
    except (KeyError, TypeError, ValueError):
        return Difference(stream, "expected numbers under mean and std", nan, nan, True)
    if stored.get("slots") != computed.get("slots"):
        where = f"slots {shown(stored.get('slots'))}: expected {computed.get('slots')}"
        return Difference(stream, where, nan, nan, True)
    for key in ours:
        if ours[key].shape != theirs[key].shape:
            where = f"{key} of shape {list(ours[key].shape)}: expected {list(theirs[key].shape)}"
            return Difference(stream, where, nan, nan, True)
    allowed = ROUNDING * torch.maximum(theirs["mean"].abs(), theirs["std"]) + 1e-12
    far = any(bool(((ours[key] - theirs[key]).abs() > allowed).any()) for key in ours)
    key = max(ours, key=lambda name: float((ours[name] - theirs[name]).abs().max()))
    place = torch.unravel_index((ours[key] - theirs[key]).abs().argmax(), ours[key].shape)
    at = tuple(int(index) for index in place)
    return Difference(stream, f"{key} {list(at)}", float(ours[key][at]), float(theirs[key][at]), far)


def _numbers(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
