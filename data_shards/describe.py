"""A shard set or one of its clips as lines of text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from data_shards.edit import Advance, nearest
from data_shards.manifest import NOT_LISTED
from data_shards.reader import ShardSet
from data_shards.schema import FPS, SPLITS, ShardError, licence_of


def describe_set(opened: ShardSet, *, deep: bool = False, advance: Advance = lambda done, total: None) -> list[str]:
    """What the manifest says; with `deep` also the licences, for which every clip is read.

    Raises ShardError for a manifest that opens but does not have the form of README.md, and for a damaged clip.
    """
    try:
        rows = _rows(opened)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, ShardError):
            raise
        path, reason = opened.root / "manifest.json", f"{type(error).__name__} {error}"
        raise ShardError(f"{path}: {reason}: expected the manifest of a shard set") from None
    return _aligned([*rows, *(_counted("licence", _licences(opened, advance)) if deep else ())])


def _rows(opened: ShardSet) -> list[tuple[str, str]]:
    manifest = opened.manifest
    video = manifest["extractors"]["video"]
    return [
        ("shard version", str(manifest["shard_version"])),
        *((f"tag of {stream}", _extractor(entry)) for stream, entry in sorted(manifest["extractors"].items())),
        ("size", f"{video['channels']} x {video['height']} x {video['width']} latents, pixel size {_pixels(manifest)}"),
        ("frames", f"{manifest['frames']} latent, {_pixel_frames(manifest)} pixel frames a clip"),
        ("video", _duration(opened)),
        *((name, _split(manifest, name)) for name in SPLITS),
        *((f"statistics of {stream}", _range(entry)) for stream, entry in sorted(manifest["statistics"].items())),
        *_counted("rejected", _reasons(manifest)),
    ]


def describe_clip(opened: ShardSet, key: str) -> list[str]:
    """Shape, dtype and range of every tensor of a clip, and its meta.

    Raises ShardError for a key that is not there (with the nearest ones) and for a damaged clip.
    """
    for name in SPLITS:
        reader = opened.split(name)
        keys = reader.keys
        if key in keys:
            clip = reader.read(keys.index(key))
            header = ("field", "shape", "dtype", "min", "mean", "max", "NaN")
            rows = [header, *((field, *_tensor(value)) for field, value in clip.tensors().items())]
            top = [("key", clip.key), ("identity", clip.identity), ("split", name)]
            meta = json.dumps(clip.meta, indent=2, sort_keys=True, ensure_ascii=False)
            return [*_aligned(top), "", *_aligned(rows), "", "meta", *map(_printable, meta.split("\n"))]
    known = [key for name in SPLITS for key in opened.split(name).keys]
    raise ShardError(f"{opened.root}: key {key!r}: expected one of the set's {len(known)}{nearest(key, known)}")


def _extractor(entry: Mapping[str, Any]) -> str:
    widths = ", ".join(f"{key} {value}" for key, value in entry.items() if type(value) is int)
    return f"{entry['tag']} ({widths})"


def _pixels(manifest: Mapping[str, Any]) -> str:
    return str(manifest.get("pixel_size", "not stated"))


def _pixel_frames(manifest: Mapping[str, Any]) -> int:
    return 1 + 4 * (int(manifest["frames"]) - 1)


def _duration(opened: ShardSet) -> str:
    clips = sum(len(opened.split(name)) for name in SPLITS)
    seconds = clips * _pixel_frames(opened.manifest) / FPS
    return f"{seconds / 3600:.3f} hours ({seconds:.2f} s in {clips} clips)"


def _split(manifest: Mapping[str, Any], name: str) -> str:
    entry = manifest["splits"][name]
    size = sum(manifest["files"][shard]["bytes"] for shard in entry["shards"])
    shards, identities = len(entry["shards"]), len(entry["identities"])
    return f"{entry['samples']} samples, {identities} identities, {size} bytes in {shards} shards"


def _range(entry: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {min(_flat(entry[key])):.4g} to {max(_flat(entry[key])):.4g}" for key in ("mean", "std"))


def _flat(values: Any) -> list[float]:
    return [number for item in values for number in _flat(item)] if isinstance(values, list) else [float(values)]


def _counted(title: str, names: Iterable[str] | Counter[str]) -> list[tuple[str, str]]:
    counts = sorted(Counter(names).items())
    return [(f"{title} {name}", str(count)) for name, count in counts] or [(title, "0")]


def _reasons(manifest: Mapping[str, Any]) -> Counter[str]:
    found = Counter(str(entry["reason"]) for entry in manifest.get("rejected", []))
    more = manifest.get("info", {}).get(NOT_LISTED, {})
    return found + Counter({str(reason): int(count) for reason, count in more.items()})


def _licences(opened: ShardSet, advance: Advance) -> Iterator[str]:
    readers = [opened.split(name) for name in SPLITS]
    done, total = 0, sum(map(len, readers))
    for reader in readers:
        for index in range(len(reader)):
            yield licence_of(reader.read(index).meta)
            done += 1
            advance(done, total)


def _tensor(value: Tensor) -> tuple[str, ...]:
    numbers = value.double()
    missing = int(numbers.isnan().sum())
    low, mean, high = (f"{float(number):.5g}" for number in (numbers.min(), numbers.mean(), numbers.max()))
    return str(list(value.shape)), str(value.dtype).removeprefix("torch."), low, mean, high, str(missing)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[_printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _printable(text: str) -> str:
    """Names come from files: what would move the cursor of a terminal, or cannot be encoded, is shown as an escape."""
    return text if text.isprintable() else ascii(text)[1:-1]
