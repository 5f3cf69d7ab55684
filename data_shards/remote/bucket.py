"""One request to an object store through fsspec, with the time and the bytes bounded on this side.

A part comes whole or not at all, so that there is nothing to resume, and fsspec does not tell of which state of the
file it is: checksums do. The package of a store (s3fs, gcsfs, adlfs) reads credentials and endpoint where it always
does, and is the user's to install.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from data_shards.remote.address import Address, without_secrets
from data_shards.remote.fetch import Answer, LastingFault, PassingFault, RemoteError
from data_shards.schema import shown

_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError)


class Bucket:
    """The files of one folder in an object store. Safe to use from several threads, and after a fork."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._owner = -1
        self._system: Any = None
        self._sizes: dict[str, tuple[int, str]] = {}
        self._filesystem()  # a package that is missing is told of at once

    def shown(self, name: str) -> str:
        """URL of a file, without secrets."""
        return self._address.shown(name)

    def forget(self, name: str) -> None:
        """Forget size and mark."""
        with self._lock:
            self._sizes.pop(self._path(name), None)

    @contextmanager
    def get(
        self, name: str, start: int, stop: int | None, seconds: float, known: str = "", stalls: int = 0
    ) -> Iterator[Answer]:
        """See `fetch.Transport`."""
        path = self._path(name)
        answers: list[Answer | BaseException] = []

        def ask() -> None:
            try:
                answers.append(self._get(path, start, stop, known))
            except BaseException as error:  # handed over, to the one who asked
                answers.append(error)

        # fsspec has no limit of time that holds for all stores. A thread that does not come back is left to itself.
        thread = threading.Thread(target=ask, name="dualforce-bucket", daemon=True)
        thread.start()
        thread.join(seconds)
        answer = answers[0] if answers else PassingFault("no answer in time: expected bytes (stalled)")
        if isinstance(answer, Answer):
            yield answer
            return
        raise _fault_of(answer) from None

    def _path(self, name: str) -> str:
        return f"{self._address.host}{self._address.path}/{name}"

    def _get(self, path: str, start: int, stop: int | None, known: str) -> Answer:
        system = self._filesystem()
        with self._lock:
            found = None if stop is None else self._sizes.get(path)
        if found is None:
            info = system.info(path)
            size = info.get("size")
            if info.get("type") != "file" or type(size) is not int:
                raise LastingFault(f"{shown(info.get('type'))}: expected a file with a size")
            found = size, str(info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("created") or "")
            with self._lock:
                self._sizes[path] = found
        total, mark = found
        if known and known == mark:
            return Answer(mark, total, start, iter(()), unchanged=True)
        data = bytes(system.cat_file(path, start=start, end=total if stop is None else stop))
        return Answer(mark, total, start, iter((data,)))

    def _filesystem(self) -> Any:
        """The file system of this process: threads and connections of fsspec do not survive a fork."""
        with self._lock:
            if self._owner != os.getpid():
                self._system, self._owner = _make(self._address), os.getpid()
            return self._system


def _make(address: Address) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(address.scheme, skip_instance_cache=True, use_listings_cache=False)
    except ImportError as error:
        reason = shown(str(error), raw=True)
        raise RemoteError(f"{address.shown()}: {reason}: expected the package of {address.scheme}://") from None


def _fault_of(error: BaseException) -> BaseException:
    if isinstance(error, PassingFault | LastingFault):
        return error
    first = (str(error).splitlines() or [""])[0]
    reason = f"{type(error).__name__} {shown(without_secrets(first), raw=True)}".strip()
    if isinstance(error, _LASTING):
        return LastingFault(f"{reason}: expected a file that may be read")
    if isinstance(error, Exception):
        return PassingFault(f"{reason}: expected bytes")
    return error
