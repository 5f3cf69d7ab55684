"""The files of a shard set: opened so that nothing outside the set is touched, parsed within limits, published whole.

A set may come from a stranger. It is therefore plain files in one folder: links, pipes and devices are refused before
anything is read from them, and a document is measured before it is parsed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from data_shards.schema import MachineError, ShardError, shown

PARTIAL = ".partial"
MAX_JSON_BYTES = 2**25
# A parsed value costs some 70 bytes however short its text is, so the text alone does not bound the memory.
MAX_JSON_VALUES = 800_000

_BLOCK = 2**20
_READS_AT_ONCE = hasattr(os, "preadv")  # not on Windows
_MOST_ROOMS = 64  # of one call; the system has a limit too
_OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT)
ResultT = TypeVar("ResultT")
Range = tuple[int, memoryview]  # offset in a file, and the room for what follows there

# A pipe would block on opening, a link could leave the folder. Windows has neither flag.
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class Folder:
    """The files of a shard set in a local folder, by name: all that reading a set asks of the place where it lies. For
    sets on a server `remote.folder.RemoteFolder` does the same.

    Names must be checked before: they are joined to `root` as they are. Every method raises ShardError, which names the
    file, for one that is missing, unreadable or not a plain file. Safe to use from several threads.
    """

    at_once = 1  # clips that are best read at a time: more where reading is waiting

    def __init__(self, root: Path, called: Path | None = None) -> None:
        """`called` is the folder that messages name, if it is another than `root`."""
        self._root = root
        self._path, self._called = os.fspath(root), os.fspath(called or root)
        self._before, self._label = os.path.join(self._path, ""), os.path.join(self._called, "")

    def __str__(self) -> str:
        """The folder as messages name it."""
        return self._called

    @property
    def root(self) -> Path:
        """The folder."""
        return self._root

    def label(self, name: str) -> str:
        """The file as messages name it."""
        return self._label + name

    def expect(self, manifest: Mapping[str, Any]) -> None:
        """Be told of the set's manifest, once its form has been checked. Nothing follows from it here."""

    def checked(self, what: str, decode: Callable[[Folder], ResultT]) -> ResultT:
        """What `decode` makes of the files, of which it checks every byte; `what` names a clip. A folder elsewhere may
        call `decode` again, with other bytes, after a ShardError."""
        return decode(self)

    def size(self, name: str) -> int:
        """Bytes of the file, which is not opened."""
        return _plain(self._before + name, self._label + name).st_size

    def document(self, name: str, most: int = MAX_JSON_BYTES) -> bytes:
        """All bytes of the file; ShardError if it is larger than `most`."""
        with _opened(self._before + name, self._label + name) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise ShardError(f"{self.label(name)}: {size} bytes: expected at most {most}")
            room = bytearray(size)
            return bytes(room[: _fill(file.fileno(), [(0, memoryview(room))])[0]])

    def fill(self, name: str, ranges: Sequence[Range]) -> list[int]:
        """Read from each offset until its room is full; how many bytes there were, fewer where the file ends."""
        label = self._label + name
        try:
            file = _open(self._before + name, label)
            try:
                return _fill(file, ranges)
            finally:
                os.close(file)
        except OSError as error:
            raise _unreadable(label, error) from None

    def digest(self, name: str) -> str:
        """sha256 of the file."""
        with _opened(self._before + name, self._label + name) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def copy(self, name: str, target: Path) -> str:
        """Copy the file to `target`, on the disk when this returns; sha256 of what was copied."""
        digest = hashlib.sha256()
        with _opened(self._before + name, self._label + name) as old:
            with writing(target):
                new = open(target, "wb", buffering=0)  # noqa: SIM115 - a buffer would be written again on closing
            with new:
                while block := old.read(_BLOCK):
                    digest.update(block)
                    with writing(target):
                        _write(new, block)
                with writing(target):
                    os.fsync(new.fileno())
        return digest.hexdigest()


def _plain(path: str, label: str) -> os.stat_result:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        raise ShardError(f"{label}: missing: expected a file of a shard set") from None
    except (OSError, ValueError) as error:
        raise _unreadable(label, error) from None
    if stat.S_ISREG(found.st_mode):
        return found
    kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "a folder, pipe, socket or device"
    raise ShardError(f"{label}: {kind}: expected a plain file")


def _open(path: str, label: str) -> int:
    """Descriptor of the file. Raises OSError too."""
    # Looked at before opening, because opening a device can act on it; and after, because it may have been replaced.
    _plain(path, label)
    file = os.open(path, _FLAGS)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise ShardError(f"{label}: a folder, pipe, socket or device: expected a plain file")
    except BaseException:
        os.close(file)
        raise
    return file


@contextmanager
def _opened(path: str, label: str) -> Iterator[FileIO]:
    """The file without a buffer; faults of the system on the way are ShardErrors."""
    try:
        with FileIO(_open(path, label)) as file:
            yield file
    except OSError as error:
        raise _unreadable(label, error) from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Faults of the system while `path` is written are ShardErrors that name it; those of reading are already."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ShardError(f"{path}: {reason}: expected a place with room, where files can be written") from None


def _unreadable(label: str, error: Exception) -> ShardError:
    reason = getattr(error, "strerror", None) or type(error).__name__
    if getattr(error, "errno", None) in _OF_THE_MACHINE:
        return MachineError(f"{label}: {reason}: expected a machine that can read it")
    return ShardError(f"{label}: {reason}: expected a readable file of a shard set")


def _fill(file: int, ranges: Sequence[Range]) -> list[int]:
    """See `Folder.fill`; ranges that follow each other in the file are read at once."""
    counts: list[int] = []
    rooms: list[memoryview] = []
    start = end = 0
    for offset, room in ranges:
        if offset != end and rooms:
            counts += _read(file, start, rooms, end - start)
            rooms = []
        if not rooms:
            start = end = offset
        rooms.append(room)
        end += len(room)
    return counts + _read(file, start, rooms, end - start) if rooms else counts


def _read(file: int, start: int, rooms: list[memoryview], size: int) -> list[int]:
    """Fill `rooms`, of `size` bytes, one after the other from `start` on; how many bytes there were for each."""
    if _READS_AT_ONCE and len(rooms) <= _MOST_ROOMS and os.preadv(file, rooms, start) == size:
        return [len(room) for room in rooms]  # nearly always, and most of the calls of a run
    count, counts = _read_on(file, start, rooms), []
    for room in rooms:
        counts.append(min(count, len(room)))
        count -= counts[-1]
    return counts


def _read_on(file: int, offset: int, rooms: Sequence[memoryview]) -> int:
    """The same however few bytes the system hands out at a time; how many there were."""
    total, left = 0, [room for room in rooms if len(room)]  # reading nothing looks like the end of the file
    while left:
        more = _read_some(file, left, offset + total)
        if not more:
            break
        total += more
        while left and more >= len(left[0]):
            more -= len(left.pop(0))
        if more:
            left[0] = left[0][more:]
    return total


def _read_some(file: int, rooms: list[memoryview], offset: int) -> int:
    if _READS_AT_ONCE:
        return os.preadv(file, rooms[:_MOST_ROOMS], offset)
    os.lseek(file, offset, os.SEEK_SET)
    data = os.read(file, len(rooms[0]))
    rooms[0][: len(data)] = data
    return len(data)


def _write(file: FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def parse_json(data: bytes, origin: str) -> dict[str, Any]:
    """The object that strict JSON holds: ASCII, finite numbers, no key twice, at most MAX_JSON_VALUES values."""
    # Every value has a sign of its own, so that a short document needs no counting.
    values = count_values(data) if len(data) > MAX_JSON_VALUES else len(data)
    if len(data) > MAX_JSON_BYTES or values > MAX_JSON_VALUES:
        raise ShardError(
            f"{origin}: {len(data)} bytes with {values} values: "
            f"expected at most {MAX_JSON_BYTES} bytes with {MAX_JSON_VALUES} values"
        )
    try:
        document = _JSON.decode(data.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{origin}: {shown(str(error))}: expected JSON") from None
    if not isinstance(document, dict):
        raise ShardError(f"{origin}: {type(document).__name__}: expected a JSON object")
    return document


def count_values(data: bytes) -> int:
    """How many values a JSON document has, at most."""
    return sum(data.count(sign) for sign in b",[{")


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value - value:  # of infinity it is NaN; a record has hundreds of numbers, and this is the fastest question
        raise ValueError(f"number {shown(text)} is too large")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {shown(key)} occurs twice")
            seen.add(key)
    return found


_JSON = json.JSONDecoder(parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)


def encode_json(value: Any, origin: str, indent: int | None = None) -> bytes:
    """Strict JSON with sorted keys, hence the same bytes for the same value; ShardError if `value` is not JSON."""
    try:
        text = json.dumps(value, sort_keys=True, allow_nan=False, indent=indent)
    except (TypeError, ValueError, RecursionError) as error:
        raise ShardError(f"{origin}: {error}: expected plain JSON with finite numbers") from None
    return text.encode("utf-8") + b"\n"


def publish(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees all of it or nothing, also after a power cut."""
    partial = path.with_name(path.name + PARTIAL)
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def sync_folder(root: Path) -> None:
    """Make the renames in `root` durable: they are only when the folder itself is on the disk."""
    if os.name == "posix":  # Windows cannot open folders; it needs no sync.
        handle = os.open(root, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
