"""A set on a server: what all reading of it shares.

The manifest is read when the set is opened, and looked at again now and then: a run must not go on with a set that is
another one by now. The index and the checksums beside the tars have their hashes in the manifest.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from data_shards.files import MAX_JSON_BYTES, parse_json
from data_shards.index import INDEX_NAME, MAX_INDEX_BYTES
from data_shards.manifest import MANIFEST_NAME, check_sealed, sums_name_of
from data_shards.remote.address import SCHEMES, WEB, Address, parse_address
from data_shards.remote.bucket import Bucket
from data_shards.remote.cache import DiskCache
from data_shards.remote.fetch import ChangedError, Check, Fetcher, FetchOptions, RemoteError, Transport, Wanted
from data_shards.remote.folder import RemoteFolder
from data_shards.remote.web import Web
from data_shards.schema import SPLITS, ShardError

CACHE_BYTES = 100 * 2**30
THREADS = 8  # requests at a time for index and checksums
MAX_SUMS = 2**25  # bytes of the checksums of a tar that are fetched whole; those of more, clip by clip
HELD = 2**25  # bytes of checksums in memory, of the tars read last


def locate(
    text: str,
    cache: Path | None = None,
    cache_bytes: int = CACHE_BYTES,
    options: FetchOptions | None = None,
    schemes: tuple[str, ...] = SCHEMES,
) -> Path | RemoteFolder:
    """The folder of a shard set, for `ShardSet.open`: a path, or a URL of one of `schemes`.

    A URL needs `cache`, a folder on a disk of this machine, in which at most `cache_bytes` are kept. Nothing is asked
    of the server here. Raises ShardError for another scheme, a URL that is not plain, or a cache that cannot be used.
    """
    address = parse_address(text, schemes)
    if isinstance(address, Path):
        return address
    if cache is None:
        value = address.shown()
        raise ShardError(f"data.cache: absent: expected a folder on a disk of this machine, for data.shards = {value}")
    return RemoteFolder(RemoteSet(address, DiskCache(cache, cache_bytes), options or FetchOptions()))


class Listed(NamedTuple):
    """A file as the manifest lists it."""

    size: int
    sha256: str


class RemoteSet:
    """A set on a server: its transport, its cache, and what its manifest says of its files. Safe for threads, after a
    fork, and to hand to another process."""

    def __init__(self, address: Address, cache: DiskCache, options: FetchOptions) -> None:
        self.address = address
        self.cache = cache
        self.options = options
        self._listed: dict[str, Listed] = {}
        self._manifest: tuple[str, str] | None = None  # sha256, mark
        self._marks: dict[str, str] = {}
        self._sums: dict[str, bytes] = {}
        self._next_look = 0.0
        self._connect()

    def _connect(self) -> None:
        web = self.address.scheme in WEB
        self._transport: Transport = Web(self.address, self.options) if web else Bucket(self.address)
        self._fetcher = Fetcher(self._transport, self.options)
        # A wrong address is told of soon, and a look at the manifest holds nothing up.
        self._first = Fetcher(self._transport, replace(self.options, attempts=min(self.options.attempts, 5)))
        self._brief = Fetcher(self._transport, replace(self.options, attempts=1, content_attempts=1))

    def __getstate__(self) -> dict[str, Any]:
        left = ("_transport", "_fetcher", "_first", "_brief", "_sums")
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _sums={})
        self._connect()

    def shown(self, name: str) -> str:
        """URL of a file, without secrets."""
        return self.address.shown(name)

    def listed(self, name: str) -> Listed:
        """What the manifest, once it has been read, says of a file."""
        if name not in self._listed:
            raise ShardError(f"{self.shown(name)}: not in the manifest: expected a file of the opened set")
        return self._listed[name]

    def document(self, name: str, most: int = MAX_JSON_BYTES) -> bytes:
        """The manifest, or a file of at most `most` bytes whose hash is the manifest's."""
        if name == MANIFEST_NAME:
            return self._read_manifest(self._first)
        size, sha256 = self.listed(name)
        if size > most:
            raise ShardError(f"{self.shown(name)}: {size} bytes: expected at most {most}")

        def check(data: bytes) -> None:
            digest = hashlib.sha256(data).hexdigest()
            if digest != sha256:
                raise ShardError(f"{self.shown(name)}: sha256 {digest}: expected {sha256}, the manifest's")

        data = self._kept(sha256, size, check)
        if data is not None:
            return data
        with self.cache.fetching(sha256):
            data = self._kept(sha256, size, check)  # another process may have fetched it meanwhile
            if data is None:
                data, _ = self._fetcher.read(Wanted(name, 0, size, size), check)
                self.cache.put(sha256, data)
            return data

    def _kept(self, key: str, size: int, check: Check) -> bytes | None:
        data = self.cache.get(key, size)
        try:
            if data is not None:
                check(data)
            return data
        except ShardError:
            self.cache.drop(key)
            return None

    def sums(self, name: str) -> bytes:
        """The checksums of a tar, in memory for those who ask next. RemoteError, too, if they are not those of the
        manifest: ranks that have them already go on reading the clips."""
        data = self._sums.get(name)
        if data is None:
            try:
                data = self._sums[name] = self.document(name, MAX_SUMS)
            except ShardError as error:
                raise error if isinstance(error, RemoteError) else RemoteError(str(error)) from None
            # Without a lock, which a fork may copy while it is held. Two threads at once may drop one more.
            total = sum(map(len, list(self._sums.values())))
            for other in list(self._sums):
                if total <= HELD:
                    break
                total -= len(self._sums.pop(other, b""))
        return data

    def is_document(self, size: int) -> bool:
        """Whether checksums of `size` bytes are fetched whole."""
        return size <= MAX_SUMS

    def expect(self, manifest: Mapping[str, Any]) -> None:
        """Take over sizes and hashes of a checked manifest; fetch index and checksums into the cache, several at a
        time."""
        self._listed = {name: Listed(file["bytes"], file["sha256"]) for name, file in manifest["files"].items()}
        sums = [sums_name_of(tar) for split in SPLITS for tar in manifest["splits"][split]["shards"]]
        names = [INDEX_NAME, *(name for name in sums if self.is_document(self._listed[name].size))]
        if sum(self._listed[name].size for name in names) > self.cache.most // 2:
            return  # they would displace each other, and clips; each is fetched when it is needed
        with ThreadPoolExecutor(THREADS, thread_name_prefix="dualforce-checksums") as pool:
            waiting = [pool.submit(self._load, name) for name in names]
            try:
                for one in waiting:
                    one.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _load(self, name: str) -> None:
        self.document(name, MAX_INDEX_BYTES if name == INDEX_NAME else MAX_SUMS)

    def range(self, name: str, start: int, stop: int, what: str) -> bytes:
        """Bytes of a tar, as the server sends them."""
        data, mark = self._fetcher.read(Wanted(name, start, stop, self.listed(name).size, what))
        self._marks.setdefault(name, mark)  # the first one
        return data

    def look(self) -> None:
        """Now and then: ChangedError if the manifest is another one by now. A server that does not answer is left to
        those who need it: what is in the cache can be read without it."""
        now = time.monotonic()
        if now < self._next_look:
            return
        first, self._next_look = not self._next_look, now + self.options.recheck
        if not first:
            self._compare()

    def explain(self, name: str, error: ShardError) -> ShardError:
        """`error` of a clip whose bytes are wrong again and again; or RemoteError if the server's files changed, or if
        that cannot be found out: only damage that every rank meets may count as damage."""
        try:
            self._read_manifest(self._first)
            self._transport.forget(name)
            _, mark = self._first.read(Wanted(name, 0, 1, self.listed(name).size))
        except ShardError as other:
            return RemoteError(f"{error}; {other}")
        if mark != self._marks.get(name, mark):
            return ChangedError(f"{error} (the tar changed on the server since the set was opened)")
        return error

    def _compare(self) -> None:
        if self._manifest is None or self._brief.unchanged(MANIFEST_NAME, self._manifest[1]):
            return
        try:
            self._read_manifest(self._brief)
        except ChangedError:
            raise
        except ShardError:
            return

    def _read_manifest(self, fetcher: Fetcher) -> bytes:
        url = self.shown(MANIFEST_NAME)

        def check(data: bytes) -> None:
            # A set of version 1 has no seal; the reader tells what to do with it.
            if parse_json(data, url).get("shard_version") != 1:
                check_sealed(data, url)

        data, mark = fetcher.read(Wanted(MANIFEST_NAME, 0, None, MAX_JSON_BYTES), check)
        digest = hashlib.sha256(data).hexdigest()
        if self._manifest is None:
            self._manifest = digest, mark
        elif self._manifest[0] != digest:
            raise ChangedError(f"{url}: sha256 {digest}: expected {self._manifest[0]}, that of the set that was opened")
        return data
