"""Shard sets behind a web server of the tests, opened with limits of milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch

from data_shards.reader import ShardSet
from data_shards.remote.fetch import FetchOptions
from data_shards.remote.source import locate
from data_shards.schema import ClipSample
from tools.bench.fault_server import ShardServer

QUICK = FetchOptions(attempts=16, first_wait=0.002, longest_wait=0.02, stall=0.25, patience=20.0, content_attempts=6)


def open_remote(server: ShardServer, cache: Path, options: FetchOptions = QUICK, most: int = 2**28) -> ShardSet:
    return ShardSet.open(locate(server.url, cache, most, options))


def same(left: ClipSample, right: ClipSample) -> bool:
    ours, theirs = left.tensors(), right.tensors()
    return (left.key, left.identity, left.meta, list(ours)) == (
        right.key, right.identity, right.meta, list(theirs)
    ) and all(ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in ours)  # fmt: skip
