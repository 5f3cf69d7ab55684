"""What shard sets must share to be used together."""

from __future__ import annotations

from collections.abc import Mapping

from data_shards.reader import ShardSet
from data_shards.schema import ShardError

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
