"""What shard sets must share to be used together."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Mapping, Sequence

import numpy as np

from data_shards.reader import ShardSet
from data_shards.schema import SPLITS, ShardError, fail

Keys = Mapping[str, tuple[str, ...]]


def check_extractors_alike(first: ShardSet, second: ShardSet, free: Keys | None = None) -> None:
    """ShardError, with both values, for extractors of `second` that are not those of `first`: the same tags, and then
    the same sizes and names. `free`: what may differ, keys by stream."""
    ours, theirs = first.manifest["extractors"], second.manifest["extractors"]
    for stream in sorted({*ours, *theirs}):
        one, other = ours.get(stream, {}), theirs.get(stream, {})
        rest = {*one, *other} - {"tag", "names", *(free or {}).get(stream, ())}
        for key in ("tag", *sorted(rest), "names"):
            if one.get(key) != other.get(key):
                raise ShardError(
                    f"{second.source}: extractors.{stream}.{key}: {other.get(key)!r}: expected {one.get(key)!r}, as in "
                    f"{first.source}"
                )


def check_identities_apart(sets: Sequence[ShardSet]) -> None:
    """ShardError for an identity that is in one split of a set and in the other of another."""
    place: dict[str, tuple[str, ShardSet]] = {}
    for opened in sets:
        for name in SPLITS:
            for identity in opened.manifest["splits"][name]["identities"]:
                other, first = place.setdefault(identity, (name, opened))
                if other != name:
                    raise ShardError(
                        f"{opened.source}: identity {identity!r} is in {name}, but in {other} of {first.source}: "
                        "expected one split (deal both sets anew: dualforce data split, with one share and seed; or "
                        "drop it in one)"
                    )


def check_clips_once(sets: Sequence[ShardSet]) -> None:
    """ShardError for a clip that is in two sets, under the same key and with the same content."""
    sums = np.concatenate([opened.clip_sums for opened in sets])
    ends = list(itertools.accumulate(len(opened.clip_sums) for opened in sets))
    order = np.argsort(sums, kind="stable")  # so that of equal ones the first comes first
    ranked = sums[order]
    for place in np.flatnonzero(ranked[1:] == ranked[:-1]).tolist():
        (one, key), (two, other) = (_clip(sets, ends, int(order[at])) for at in (place, place + 1))
        if one is not two and key == other:
            raise fail(str(two.source), key, "clip", "the same as there", f"one that is not in {one.source}")


def _clip(sets: Sequence[ShardSet], ends: Sequence[int], number: int) -> tuple[ShardSet, str]:
    """Set and key of a clip, counted over all sets."""
    place = bisect_right(ends, number)
    opened = sets[place]
    return opened, opened.key(number - ends[place] + len(opened.clip_sums))
