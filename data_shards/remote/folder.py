"""The files of a set on a server, where reading asks for those of a `Folder`.

Training reads a clip here and a clip there, over the whole set. So a clip (or its first frames) is fetched as the byte
range that it is, and not its tar of a gigabyte; ranges of one clip with little between them are one request. What was
fetched is kept on disk as one entry a clip, once the checksums of the index have been found right: entries of whole
tars would be few and large, and blocks of fixed size would be neither what is read nor what is checked. The checksums
of a tar are one file, fetched whole.

What is kept is checked again whenever it is read. Bytes that are wrong are fetched anew, some times, before the clip
counts as damaged; a server that cannot be read, and a set that changed on it, never do (`RemoteError`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from data_shards.files import MAX_JSON_BYTES, Folder, Range
from data_shards.remote.fetch import RemoteError
from data_shards.schema import ShardError

if TYPE_CHECKING:
    from data_shards.remote.source import RemoteSet

JOINED = 2**20  # bytes between two ranges that are fetched rather than asked for apart: a request costs as much time
AHEAD = 2**23  # bytes of one request where a file is read from end to end

ResultT = TypeVar("ResultT")
Span = tuple[int, int]
Part = tuple[int, bytes]  # where in the file it begins


class RemoteFolder(Folder):
    """A `Folder` on a server. `checked` is the way of training; `fill` and `digest` by themselves read without the
    cache. Every method also raises RemoteError. Safe to use from several threads, after a fork, and to hand to another
    process."""

    at_once = 8

    def __init__(self, source: RemoteSet) -> None:
        self.source = source

    def __str__(self) -> str:
        return self.source.shown("")

    def __repr__(self) -> str:
        return f"RemoteFolder({str(self)!r})"

    @property
    def root(self) -> Path:
        """ShardError: there is none."""
        self._not_here(str(self))

    def label(self, name: str) -> str:
        """URL of the file, without secrets."""
        return self.source.shown(name)

    def expect(self, manifest: Mapping[str, Any]) -> None:
        """See `RemoteSet.expect`."""
        self.source.expect(manifest)

    def size(self, name: str) -> int:
        """Bytes of the file as the manifest has them; a server that has others is told of when they are read."""
        return self.source.listed(name).size

    def document(self, name: str, most: int = MAX_JSON_BYTES) -> bytes:
        """The manifest, or a file with the hash that the manifest gives it."""
        return self.source.document(name, most)

    def fill(self, name: str, ranges: Sequence[Range]) -> list[int]:
        """As of a `Folder`."""
        return _copied(ranges, self._fetched(name, _joined(ranges, self.size(name)), ""))

    def digest(self, name: str) -> str:
        """As of a `Folder`."""
        size, digest = self.size(name), hashlib.sha256()
        for start in range(0, size, AHEAD):
            digest.update(self.source.range(name, start, min(start + AHEAD, size), ""))
        return digest.hexdigest()

    def copy(self, name: str, target: Path) -> str:
        """ShardError: new sets are made of local ones."""
        self._not_here(self.label(name))

    def checked(self, what: str, decode: Callable[[Folder], ResultT]) -> ResultT:
        """As of a `Folder`, from the cache or the server. ShardError of `decode` is believed only when bytes that the
        server sent anew are wrong too, `content_attempts` times."""
        self.source.look()
        clip = _Clip(self.source, what)
        found = clip.from_cache(decode)
        if found:
            return found[0]
        with self.source.cache.fetching(clip.key):
            # Another process may have fetched it meanwhile.
            found = clip.from_cache(decode)
            return found[0] if found else clip.from_server(decode)

    def _fetched(self, name: str, spans: list[Span], what: str) -> list[Part]:
        return [(start, self.source.range(name, start, stop, what)) for start, stop in spans]

    def _not_here(self, place: str) -> NoReturn:
        raise ShardError(f"{place}: on a server: expected a set in a folder of this machine")


class _Absent(Exception):
    """Bytes that are not in the cache."""


class _Clip(RemoteFolder):
    """The files of a set while one clip is read, in one thread. No lock may be taken while that of the clip is held:
    two may be one file, and a process would wait for itself. So checksums are kept from the first pass on."""

    def __init__(self, source: RemoteSet, what: str) -> None:
        super().__init__(source)
        self.key = ""  # of the first bytes that were asked for
        self._what = what
        self._ask = False  # the server, and nothing else
        self._name = ""  # of the file they are of
        self._sums: dict[str, bytes] = {}
        self._parts: dict[str, list[Part]] = {}  # bytes by key, as far as this pass has met them

    def fill(self, name: str, ranges: Sequence[Range]) -> list[int]:
        """From the cache, or else from the server."""
        size = self.size(name)
        if not name.endswith(".tar") and self.source.is_document(size):
            if name not in self._sums:
                self._sums[name] = self.source.sums(name)
            return _copied(ranges, [(0, self._sums[name])])
        spans = _joined(ranges, size)
        key = f"{self.source.listed(name).sha256}:{spans}"
        self.key, self._name = self.key or key, name
        self._parts[key] = self._fetched(name, spans, self._what) if self._ask else self._kept(key, spans)
        return _copied(ranges, self._parts[key])

    def _kept(self, key: str, spans: list[Span]) -> list[Part]:
        data = self.source.cache.get(key, sum(stop - start for start, stop in spans))
        if data is None:
            raise _Absent
        parts, at = [], 0
        for start, stop in spans:
            parts.append((start, data[at : at + stop - start]))
            at += stop - start
        return parts

    def from_cache(self, decode: Callable[[Folder], ResultT]) -> tuple[ResultT] | None:
        """What `decode` makes of what is kept, None if that is absent or wrong."""
        self._parts.clear()
        try:
            return (decode(self),)
        except _Absent:
            return None
        except RemoteError:
            raise
        except ShardError:
            if not self._parts:  # of checksums, whose hash is that of the manifest
                raise
            for key in self._parts:
                self.source.cache.drop(key)
            return None

    def from_server(self, decode: Callable[[Folder], ResultT]) -> ResultT:
        """What `decode` makes of what the server sends; that is kept if it was right."""
        options, wrong, self._ask = self.source.options, None, True
        for attempt in range(options.content_attempts):
            if attempt:
                time.sleep(options.pause(attempt - 1))  # wrong bytes say nothing of how busy the server is
            self._parts.clear()
            try:
                result = decode(self)
            except RemoteError:
                raise
            except ShardError as error:
                wrong = error
                continue
            for key, parts in self._parts.items():
                self.source.cache.put(key, b"".join(data for _, data in parts))
            return result
        if wrong is None:
            raise ValueError(f"content_attempts: {options.content_attempts}: expected at least 1")
        raise self.source.explain(self._name, wrong)


def _joined(ranges: Sequence[Range], size: int) -> list[Span]:
    """What the ranges cover of a file of `size` bytes, in order, those with little between them as one."""
    joined: list[Span] = []
    for start, stop in sorted((offset, min(offset + len(room), size)) for offset, room in ranges):
        if start >= stop:
            continue
        if joined and start - joined[-1][1] <= JOINED:
            joined[-1] = joined[-1][0], max(stop, joined[-1][1])
        else:
            joined.append((start, stop))
    return joined


def _copied(ranges: Sequence[Range], parts: Sequence[Part]) -> list[int]:
    """Fill the rooms; how many bytes there were for each."""
    counts = []
    for offset, room in ranges:
        start, data = next(((s, d) for s, d in parts if s <= offset < s + len(d)), (offset, b""))
        piece = memoryview(data)[offset - start :][: len(room)]
        room[: len(piece)] = piece
        counts.append(len(piece))
    return counts
