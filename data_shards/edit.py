"""Shard sets out of shard sets: merged, dealt into train and validation anew, or without some of their clips.

The sets that are read are never changed, and the new one appears in a folder that did not exist. One clip is held at a
time. The same call on the same sets gives the same bytes.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_shards.alike import check_clips_once, check_extractors_alike, check_identities_apart
from data_shards.claim import MARK
from data_shards.files import writing
from data_shards.index import MAX_CLIPS
from data_shards.manifest import room_of
from data_shards.mentions import Names, tells, texts, without
from data_shards.reader import ShardSet
from data_shards.schema import SPLITS, ClipSample, ShardError, check_key, fail, licence_of
from data_shards.shard import own_files
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
    Raises ShardError for `out` (check_out), a set given twice, extractors or frames that differ, a key in two sets, an
    identity that would be in both splits, more clips or identities than a set may have, and, with a prefix too, a clip
    that is in two sets.
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
    if (clips := sum(len(opened.clip_sums) for opened in sets)) > MAX_CLIPS:
        raise ShardError(f"{out}: {clips} clips in {len(sets)} sets: expected at most {MAX_CLIPS} in one")
    room_of(identity for opened in sets for identity in _identities(opened)).check(len(sets), str(out))
    _check_keys(sets, prefix)
    check_identities_apart(sets)
    check_clips_once(sets)
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
    people, called = frozenset(identities), frozenset(keys)
    _check_left(opened, people, called)
    gone, kept = _Told(), _Told()
    with _new_set(out, opened.manifest["extractors"]) as writer:
        for _, name, clip in _clips([opened], advance):
            drops = clip.identity in people or clip.key in called
            (gone if drops else kept).add(clip)
            if not drops:
                writer.add(name, clip)
        names = Names(gone.keys | (gone.identities - kept.identities) | (gone.sources - kept.sources))
        before, info = opened.manifest.get("rejected", []), opened.manifest.get("info", {})
        rejected = [entry for entry in before if not tells(entry, names, kept.sources)]
        earlier = info.get("dropped_clips")
        count = len(gone.keys) + (earlier if type(earlier) is int else 0)
        info = {**without(info, names), "dropped_clips": count}
        if "licences" in info:  # a build's count of its clips
            info["licences"] = dict(sorted(kept.licences.items()))
        writer.finish(rejected, info)
    mentions = {key for text, key in kept.texts.items() if names.are_in(text)}
    return Dropped(len(gone.keys), len(kept.keys), len(before) - len(rejected), tuple(sorted(mentions)))


def check_out(root: Path, out: Path) -> None:
    """Raise ShardError if `out` exists or lies inside the set `root`."""
    if os.path.lexists(out):
        raise _exists(out)
    if out.resolve().is_relative_to(root.resolve()):
        raise ShardError(f"{out}: inside the shard set {root}: expected a folder outside it")


def _exists(out: Path) -> ShardError:
    names = set(os.listdir(out)) if out.is_dir() else set()
    left = bool(names) and names == {MARK, *(path.name for path in own_files(out))}
    hint = " (it holds shards without a manifest, as a command that was killed leaves them: remove it)" if left else ""
    return ShardError(f"{out}: exists: expected a new folder{hint}")


def nearest(name: str, names: Iterable[str]) -> str:
    """The names most like `name`, as the end of a message; empty if none is like it."""
    close = difflib.get_close_matches(name, list(names), n=3)
    return f" (nearest: {', '.join(map(repr, close))})" if close else ""


@dataclass
class _Told:
    """What clips are called, and where each text in them was first seen. Grows with the names, not with the data."""

    keys: set[str] = field(default_factory=set)
    identities: set[str] = field(default_factory=set)
    sources: set[str] = field(default_factory=set)
    texts: dict[str, str] = field(default_factory=dict)  # text -> key of the first clip that has it
    licences: Counter[str] = field(default_factory=Counter)

    def add(self, clip: ClipSample) -> None:
        self.keys.add(clip.key)
        self.identities.add(clip.identity)
        source = clip.meta.get("source")
        if isinstance(source, str) and source:
            self.sources.add(source)
        self.licences[licence_of(clip.meta)] += 1
        for text in (clip.key, clip.identity, *texts(clip.meta)):
            self.texts.setdefault(text, clip.key)


@contextmanager
def _new_set(out: Path, extractors: dict[str, dict[str, Any]]) -> Iterator[ShardSetWriter]:
    """A writer whose folder is made here, and gone again when the block fails, so that the command can be repeated."""
    with writing(out):
        try:
            out.mkdir(parents=True)
        except FileExistsError:  # since it was looked for: another command makes a set there
            raise _exists(out) from None
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
    """Equal extractors, frames and text tokens."""
    check_extractors_alike(first, second)
    ours, theirs = ({"frames": one.manifest["frames"], "text tokens": one.tokens} for one in (first, second))
    for what, value in theirs.items():
        if value != ours[what]:
            raise ShardError(f"{second.root}: {what}: {value}: expected {ours[what]}, as in {first.root}")


def _check_keys(sets: Sequence[ShardSet], prefix: bool) -> None:
    used: dict[str, Path] = {}
    for number, opened in enumerate(sets, 1):
        for key in (key for name in SPLITS for key in opened.split(name).keys):
            if prefix:
                check_key(f"{number}-{key}", str(opened.root))
            elif key in used:
                raise fail(str(opened.root), key, "key", key, f"one that {used[key]} does not use (or --prefix)")
            used[key] = opened.root


def _check_left(opened: ShardSet, people: frozenset[str], called: frozenset[str]) -> None:
    train = opened.split(SPLITS[0])
    if all(key in called or train.identity(index) in people for index, key in enumerate(train.keys)):
        told = f"none of {len(train)} train clips would be left"
        raise ShardError(f"{opened.root}: {told}: expected at least 1 to train on")


def _check_known(kind: str, names: Iterable[str], known: Sequence[str], root: Path) -> None:
    there = frozenset(known)
    for name in names:
        if name not in there:
            raise ShardError(f"{root}: {kind} {name!r}: expected one of the set's {len(known)}{nearest(name, known)}")
