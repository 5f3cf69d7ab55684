"""The files of a shard set: opened so that nothing outside the set is touched, parsed within limits, published whole.

A set may come from a stranger. It is therefore plain files in one folder: links, pipes and devices are refused before
anything is read from them, and a document is measured before it is parsed.
"""

from __future__ import annotations

import json
import math
import os
import stat
from io import FileIO
from pathlib import Path
from typing import Any, NoReturn

from data_shards.schema import ShardError, shown

PARTIAL = ".partial"
MAX_JSON_BYTES = 2**25
# A parsed value costs some 70 bytes however short its text is, so the text alone does not bound the memory.
MAX_JSON_VALUES = 800_000

# A pipe would block on opening, a link could leave the folder. Windows has neither flag.
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


def open_plain(path: Path) -> FileIO:
    """`path` for reading, without a buffer; ShardError unless it is a regular file (a link is not)."""
    try:
        # Before opening, because opening a device can act on it; and after, because the file may have been replaced.
        found = os.lstat(path)
        if stat.S_ISREG(found.st_mode):
            file = os.fdopen(os.open(path, _FLAGS), "rb", buffering=0)
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file
            file.close()
    except FileNotFoundError:
        raise ShardError(f"{path}: missing: expected a file of a shard set") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ShardError(f"{path}: {reason}: expected a readable file of a shard set") from None
    kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "a folder, pipe, socket or device"
    raise ShardError(f"{path}: {kind}: expected a plain file")


def read_range(file: FileIO, offset: int, size: int) -> bytes:
    """`size` bytes from `offset`, fewer where the file ends."""
    file.seek(offset)
    data = file.read(size)
    while len(data) < size:
        more = file.read(size - len(data))
        if not more:
            break
        data += more
    return data


def read_into(file: FileIO, offset: int, room: memoryview) -> int:
    """Fill `room` from `offset` on; returns how many bytes there were, fewer where the file ends."""
    file.seek(offset)
    count = 0
    while count < len(room):
        more = file.readinto(room[count:])
        if not more:
            break
        count += more
    return count


def read_document(path: Path) -> bytes:
    """All bytes of a manifest or an index; ShardError if it is no plain file or larger than MAX_JSON_BYTES."""
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise ShardError(f"{path}: {size} bytes: expected at most {MAX_JSON_BYTES}")
        return read_range(file, 0, size)


def parse_json(data: bytes, origin: str) -> dict[str, Any]:
    """The object that strict JSON holds: ASCII, finite numbers, no key twice, at most MAX_JSON_VALUES values."""
    values = sum(data.count(sign) for sign in b",[{")
    if len(data) > MAX_JSON_BYTES or values > MAX_JSON_VALUES:
        raise ShardError(
            f"{origin}: {len(data)} bytes with {values} values: "
            f"expected at most {MAX_JSON_BYTES} bytes with {MAX_JSON_VALUES} values"
        )
    try:
        text = data.decode("ascii")
        document = json.loads(text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{origin}: {shown(str(error))}: expected JSON") from None
    if not isinstance(document, dict):
        raise ShardError(f"{origin}: {type(document).__name__}: expected a JSON object")
    return document


def _no_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
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
