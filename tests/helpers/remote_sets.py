"""Shard sets behind a web server of the tests, opened with limits of milliseconds."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
import torch

from data_shards.reader import ShardSet
from data_shards.remote.fetch import FetchOptions
from data_shards.remote.source import locate
from data_shards.schema import ClipSample
from tools.bench.fault_server import ShardServer

# Without second requests: a machine that is busy would send some, and tests count.
QUICK = FetchOptions(
    attempts=16, first_wait=0.002, longest_wait=0.02, stall=0.25, patience=20.0, content_attempts=6, second=0.0
)


def open_remote(server: ShardServer, cache: Path, options: FetchOptions = QUICK, most: int = 2**28) -> ShardSet:
    return ShardSet.open(locate(server.url, cache, most, options))


def certificate(folder: Path) -> ssl.SSLContext:
    """What a server of 127.0.0.1 needs for https; FOLDER/cert is for the client's SSL_CERT_FILE. Skips the test where
    openssl is missing."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key", "-out", folder / "cert"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert", folder / "key")
    return context


def same(left: ClipSample, right: ClipSample) -> bool:
    ours, theirs = left.tensors(), right.tensors()
    return (left.key, left.identity, left.meta, list(ours)) == (
        right.key, right.identity, right.meta, list(theirs)
    ) and all(ours[n].dtype == theirs[n].dtype and torch.equal(ours[n], theirs[n]) for n in ours)  # fmt: skip
