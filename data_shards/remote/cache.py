"""Bytes on disk, bounded, shared by the processes of one machine, and never believed.

One file per entry, named by a hash of its key. A key says which bytes are meant (hash of the tar, first and last byte),
so that an entry never becomes stale, and whoever takes one checks it against the checksums of the index: a damaged
entry costs another request and nothing else. Entries are therefore neither synced nor checksummed here.

    CACHE/lock         held while an entry is written or entries are removed
    CACHE/bytes        the sum of all entries, at least
    CACHE/entry.new    the entry that is being written; the only file that a kill leaves, and the next writes over it
    CACHE/locks/NNN    held while an entry is fetched, so that the ranks of one machine fetch it once
    CACHE/XX/HASH      entries; the time of change is that of the last use

The sum is raised before an entry appears, so that a kill leaves it too high, never too low; counting anew before
entries are removed puts it right. Entries are read without a lock: they appear whole and disappear whole.
"""

from __future__ import annotations

import hashlib
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from data_shards.remote.fetch import RemoteError

STRIPES = 256
LOCK_SECONDS = 20.0  # a process that was stopped while it held a lock must not stop the others
_KEEP = 0.9  # share of the bound that is left when entries are removed: so that it is not done for every one
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class DiskCache:
    """At most `most` bytes of entries in the folder `root`, those used last. Safe for threads and processes."""

    def __init__(self, root: Path, most: int) -> None:
        self.root = root
        self.most = most
        try:
            (root / "locks").mkdir(parents=True, exist_ok=True)
            with self._locked():
                (root / "bytes").unlink(missing_ok=True)  # counted anew: a power cut may have left it too low
                self._make_room(0)  # another run may have had a larger bound
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise RemoteError(f"data.cache: {root}: {reason}: expected a folder that can be written") from None

    def get(self, key: str, size: int | None = None) -> bytes | None:
        """The entry, or None if there is none, or one of another size (which is removed)."""
        path = self._path(key)
        try:
            with open(os.open(path, _FLAGS), "rb", buffering=0) as file:
                found = os.fstat(file.fileno())
                if stat.S_ISREG(found.st_mode) and found.st_size <= self.most and size in (None, found.st_size):
                    data = file.read(found.st_size)
                    if data is not None and len(data) == found.st_size:
                        os.utime(path)
                        return data
        except FileNotFoundError:
            return None
        except OSError as error:
            self._tell(error)
            return None
        self.drop(key)
        return None

    def put(self, key: str, data: bytes) -> None:
        """Keep an entry, for which those used longest ago make room; one that cannot be kept is warned of."""
        if len(data) > self.most:
            return
        path = self._path(key)
        try:
            with self._locked():
                if path.is_file():
                    return
                self._make_room(len(data))
                new = self.root / "entry.new"
                new.write_bytes(data)
                path.parent.mkdir(exist_ok=True)
                os.replace(new, path)
        except (OSError, Timeout) as error:
            self._tell(error)

    def drop(self, key: str) -> None:
        """Remove an entry that is not what it should be. (The sum stays too high until it is counted anew.)"""
        try:
            self._path(key).unlink(missing_ok=True)
        except OSError as error:
            self._tell(error)

    @contextmanager
    def fetching(self, key: str) -> Iterator[None]:
        """Wait for others that fetch the entry, LOCK_SECONDS at most."""
        lock = FileLock(self.root / "locks" / f"{int(_hash(key)[:8], 16) % STRIPES:03d}")
        try:
            lock.acquire(timeout=LOCK_SECONDS, poll_interval=0.005)
        except (OSError, Timeout):
            yield  # fetched twice rather than not at all
            return
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with FileLock(self.root / "lock", timeout=LOCK_SECONDS, poll_interval=0.002):
            yield

    def _make_room(self, size: int) -> None:
        total = self._read_sum()
        if total is None or total + size > self.most:
            entries = sorted(self._entries())
            total = sum(entry[1] for entry in entries)
            keep = self.most if total + size <= self.most else int(self.most * _KEEP)
            for _, bytes_, path in entries:
                if total + size <= keep or not total:
                    break
                path.unlink(missing_ok=True)
                total -= bytes_
        (self.root / "bytes").write_text(f"{total + size}\n", encoding="ascii")

    def _read_sum(self) -> int | None:
        try:
            text = (self.root / "bytes").read_text(encoding="ascii").strip()
        except (FileNotFoundError, ValueError):
            return None
        return int(text) if text.isdecimal() and len(text) < 20 else None

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        for folder in os.scandir(self.root):
            if len(folder.name) == 2 and folder.is_dir(follow_symlinks=False):
                for entry in os.scandir(folder):
                    try:
                        found = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:  # dropped by another process
                        continue
                    yield found.st_mtime, found.st_size, Path(entry.path)

    def _path(self, key: str) -> Path:
        name = _hash(key)
        return self.root / name[:2] / name

    def _tell(self, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or type(error).__name__
        warnings.warn(f"data.cache: {self.root}: {reason}: read from the server again", RuntimeWarning, stacklevel=3)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
