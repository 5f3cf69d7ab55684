"""Shard sets out of shard sets: merged, dealt into train and validation anew, or without some of their clips.

The sets that are read are never changed, and the new one appears in a folder that did not exist. One clip is held at a
time. The same call on the same sets gives the same bytes.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_shards.alike import check_extractors_alike
from data_shards.reader import ShardSet
from data_shards.schema import SPLITS, ClipSample, ShardError, check_key, fail
from data_shards.writer import ShardSetWriter

Advance = Callable[[int, int], None]  # after each clip: how many are done, of how many


@dataclass(frozen=True)
class Dropped:
    """What `drop` did: clips gone and kept, entries of `rejected` gone, and `mentions`.

    Those are keys of kept clips whose key, identity or meta names something that was dropped, which only a person can
    judge. Of clips that share the text, the first is given.
    """

    clips: int
    kept: int
    rejected: int
    mentions: tuple[str, ...]


def merge(
    out: Path, roots: Sequence[Path], *, prefix: bool = False, advance: Advance = lambda done, total: None
) -> dict[str, Any]:
    """Write the clips of two or more sets to `out`, set after set; returns the new manifest.

    `prefix` puts the number of the set before every key: "2-KEY" for the second.
    Raises ShardError for `out` (check_out), a set given twice, extractors or frames that differ, a key in two sets, and
    an identity that would be in both splits.
    """
    if len(roots) < 2:
        raise ShardError(f"{len(roots)} shard sets to merge: expected at least 2")
    for root in roots:
        check_out(root, out)
    sets = [ShardSet.open(root) for root in roots]
    digests = [hashlib.sha256((root / "manifest.json").read_bytes()).hexdigest() for root in roots]
    for other, second in enumerate(sets[1:], 1):
        if digests[other] in digests[:other]:
            raise ShardError(f"{second.root}: the same set as {roots[digests.index(digests[other])]}: expected another")
        _check_alike(sets[0], second)
    _check_keys(sets, prefix)
    _check_identities(sets)
    with _new_set(out, sets[0].manifest["extractors"]) as writer:
        for number, split, clip in _clips(sets, advance):
            writer.add(split, replace(clip, key=f"{number}-{clip.key}") if prefix else clip)
        rejected = [entry for opened in sets for entry in opened.manifest.get("rejected", [])]
        sources = [
            {"manifest_sha256": digest, "info": opened.manifest.get("info", {})}
            for digest, opened in zip(digests, sets, strict=True)
        ]
        return writer.finish(rejected, {"merged": sources, "prefixed": prefix})


def split(
    root: Path, out: Path, *, validation: float, seed: int = 0, advance: Advance = lambda done, total: None
) -> dict[str, Any]:
    """Write the clips of a set to `out` with its identities dealt anew (`side_of`); returns the new manifest.

    Raises ShardError for `out` (check_out), a share that is not between 0 and 1, and a side without an identity.
    """
    if not 0 < validation < 1:
        raise ShardError(f"validation share {validation}: expected more than 0 and less than 1")
    check_out(root, out)
    opened = ShardSet.open(root)
    sides = {name: side_of(name, validation, seed) for name in _identities(opened)}
    for side in SPLITS:
        if side not in sides.values():
            raise ShardError(
                f"{root}: none of {len(sides)} identities falls to {side} with a validation share of {validation} and "
                f"seed {seed}: expected at least 1 (choose another share or seed)"
            )
    with _new_set(out, opened.manifest["extractors"]) as writer:
        for _, _, clip in _clips([opened], advance):
            writer.add(sides[clip.identity], clip)
        info = {**opened.manifest.get("info", {}), "split": {"validation": validation, "seed": seed}}
        return writer.finish(opened.manifest.get("rejected", []), info)


def side_of(identity: str, validation: float, seed: int) -> str:
    """ "train" or "validation", by the SHA-256 of seed and identity and nothing else.

    The other identities have no say, so that those of a set that grows stay where they are.
    """
    digest = hashlib.sha256(f"{seed}:{identity}".encode("utf-8", "surrogatepass")).digest()
    return "validation" if int.from_bytes(digest[:8], "big") < validation * 2**64 else "train"


def drop(
    root: Path,
    out: Path,
    *,
    identities: Sequence[str] = (),
    keys: Sequence[str] = (),
    advance: Advance = lambda done, total: None,
) -> Dropped:
    """Write a set to `out` without the clips of `identities` and without those called `keys`.

    Nothing in `out` names what has gone: keys, and identities and sources (`meta.source`) of which no clip is left.
    Entries of `rejected` and values of `info` that name them go too; `info.dropped_clips` counts clips, also those
    dropped earlier. Everything else stays as it is, down to the bytes of the members.
    Raises ShardError for `out` (check_out), nothing to drop, a name that is not in the set (with the nearest ones), and
    a set of which no train clip would be left.
    """
    check_out(root, out)
    opened = ShardSet.open(root)
    if not identities and not keys:
        raise ShardError(f"{root}: nothing to drop: expected at least one identity or key")
    _check_known("identity", identities, _identities(opened), root)
    _check_known("key", keys, [key for name in SPLITS for key in opened.split(name).keys], root)
    gone, kept = _Names(), _Names()
    with _new_set(out, opened.manifest["extractors"]) as writer:
        for _, name, clip in _clips([opened], advance):
            drops = clip.identity in identities or clip.key in keys
            (gone if drops else kept).add(clip)
            if not drops:
                writer.add(name, clip)
        names = gone.keys | (gone.identities - kept.identities) | (gone.sources - kept.sources)
        mentioned = _pattern(names)
        before, info = opened.manifest.get("rejected", []), opened.manifest.get("info", {})
        rejected = [entry for entry in before if not _tells(entry, mentioned, kept.sources)]
        earlier = info.get("dropped_clips")
        count = len(gone.keys) + (earlier if type(earlier) is int else 0)
        writer.finish(rejected, {**_without(info, mentioned), "dropped_clips": count})
    mentions = {key for text, key in kept.texts.items() if mentioned.search(text)}
    return Dropped(len(gone.keys), len(kept.keys), len(before) - len(rejected), tuple(sorted(mentions)))


def check_out(root: Path, out: Path) -> None:
    """Raise ShardError if `out` exists or lies inside the set `root`."""
    if os.path.lexists(out):
        raise ShardError(f"{out}: exists: expected a new folder")
    if out.resolve().is_relative_to(root.resolve()):
        raise ShardError(f"{out}: inside the shard set {root}: expected a folder outside it")


def nearest(name: str, names: Iterable[str]) -> str:
    """The names most like `name`, as the end of a message; empty if none is like it."""
    close = difflib.get_close_matches(name, list(names), n=3)
    return f" (nearest: {', '.join(map(repr, close))})" if close else ""


@dataclass
class _Names:
    """What clips are called, and where each text in them was first seen. Grows with the names, not with the data."""

    keys: set[str] = field(default_factory=set)
    identities: set[str] = field(default_factory=set)
    sources: set[str] = field(default_factory=set)
    texts: dict[str, str] = field(default_factory=dict)  # text -> key of the first clip that has it

    def add(self, clip: ClipSample) -> None:
        self.keys.add(clip.key)
        self.identities.add(clip.identity)
        source = clip.meta.get("source")
        if isinstance(source, str) and source:
            self.sources.add(source)
        for text in (clip.key, clip.identity, *_texts(clip.meta)):
            self.texts.setdefault(text, clip.key)


@contextmanager
def _new_set(out: Path, extractors: dict[str, dict[str, Any]]) -> Iterator[ShardSetWriter]:
    """A writer whose folder is gone again when the block fails, so that the command can be repeated."""
    try:
        with ShardSetWriter(out, extractors) as writer:
            yield writer
    except BaseException:
        with suppress(OSError):
            out.rmdir()
        raise


def _clips(sets: Sequence[ShardSet], advance: Advance) -> Iterator[tuple[int, str, ClipSample]]:
    """(number of the set from 1, split, clip) of every clip."""
    readers = [(number, name, opened.split(name)) for number, opened in enumerate(sets, 1) for name in SPLITS]
    done, total = 0, sum(len(reader) for _, _, reader in readers)
    for number, name, reader in readers:
        for index in range(len(reader)):
            yield number, name, reader.read(index)
            done += 1
            advance(done, total)


def _identities(opened: ShardSet) -> list[str]:
    return [identity for name in SPLITS for identity in opened.manifest["splits"][name]["identities"]]


def _check_alike(first: ShardSet, second: ShardSet) -> None:
    """Equal extractors and frames."""
    check_extractors_alike(first, second)
    ours, theirs = first.manifest["frames"], second.manifest["frames"]
    if ours != theirs:
        raise ShardError(f"{second.root}: frames: {theirs}: expected {ours}, as in {first.root}")


def _check_keys(sets: Sequence[ShardSet], prefix: bool) -> None:
    used: dict[str, Path] = {}
    for number, opened in enumerate(sets, 1):
        for key in (key for name in SPLITS for key in opened.split(name).keys):
            if prefix:
                check_key(f"{number}-{key}", str(opened.root))
            elif key in used:
                raise fail(str(opened.root), key, "key", key, f"one that {used[key]} does not use (or --prefix)")
            used[key] = opened.root


def _check_identities(sets: Sequence[ShardSet]) -> None:
    place: dict[str, tuple[str, Path]] = {}
    for opened in sets:
        for name in SPLITS:
            for identity in opened.manifest["splits"][name]["identities"]:
                other, root = place.setdefault(identity, (name, opened.root))
                if other != name:
                    raise ShardError(
                        f"{opened.root}: identity {identity!r} is in {name}, but in {other} of {root}: expected one "
                        "split (deal one of the sets anew, or drop it there)"
                    )


def _check_known(kind: str, names: Iterable[str], known: Sequence[str], root: Path) -> None:
    for name in names:
        if name not in known:
            raise ShardError(f"{root}: {kind} {name!r}: expected one of the set's {len(known)}{nearest(name, known)}")


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Finds any of the names as a whole: "id1" in "id1.mp4" and "my_ID1b", but not in "id10" or "paid1".

    A name ends where letters do not go on as letters, nor digits as digits. Rather too much is found than too little:
    what is lost is a line of a report.
    """

    def edge(character: str) -> str:
        return r"\d" if character.isdigit() else r"[^\W\d_]" if character.isalpha() else r"(?!)"

    parts = [f"(?<!{edge(name[0])}){re.escape(name)}(?!{edge(name[-1])})" for name in sorted(names)]
    return re.compile("|".join(parts) or r"(?!)", re.IGNORECASE)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, names of fields included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _tells(entry: Any, mentioned: re.Pattern[str], kept: set[str]) -> bool:
    """An entry of `rejected` names something that went. A kept clip's source is no hint, whatever it is called."""
    if isinstance(entry, Mapping) and entry.get("source") in kept:
        entry = {key: value for key, value in entry.items() if key != "source"}
    return any(mentioned.search(text) for text in _texts(entry))


def _without(value: Any, mentioned: re.Pattern[str]) -> Any:
    """A JSON value without the fields and items that are, or are called, something that went."""

    def bad(item: Any) -> bool:
        return isinstance(item, str) and mentioned.search(item) is not None

    if isinstance(value, Mapping):
        return {key: _without(item, mentioned) for key, item in value.items() if not bad(key) and not bad(item)}
    if isinstance(value, list | tuple):
        return [_without(item, mentioned) for item in value if not bad(item)]
    return value
