"""What a checkpoint consists of: size and hash of every file, written last, compared before anything is loaded.

The hash (xxh3, as in shards) is of the bytes that were handed to the file system, not of what came back from it. So it
tells what the disk has spoilt in writing as well as later, when the checkpoint is read. It tells damage, not forgery.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
from xxhash import xxh3_64, xxh3_64_hexdigest

from dualforce.config import ConfigError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
BLOCK = 16 << 20  # bytes read at once


class FileSum(NamedTuple):
    """Of the bytes of a file: how many, and their xxh3_64 in hexadecimal."""

    size: int
    xxh3_64: str


class SummedFile:
    """What is written to a file, with its sum; enough of a file for torch.save."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self._size = file, xxh3_64(), 0
        self.error: OSError | None = None  # of a write; torch.save tells another in its place

    def write(self, data: bytes | memoryview) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self._hash.update(data)
        size = memoryview(data).nbytes
        self._size += size
        return size

    def flush(self) -> None:
        """Nothing: `write_file` does, at the end."""

    @property
    def sum(self) -> FileSum:
        return FileSum(self._size, self._hash.hexdigest())


def write_file(path: Path, write: Callable[[SummedFile], object]) -> FileSum:
    """Create `path` with what `write` puts into it, on the disk when this returns. ConfigError where it cannot be."""
    summed: SummedFile | None = None
    try:
        with path.open("wb") as file:
            summed = SummedFile(file)
            write(summed)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else summed.error if summed is not None else None
        if cause is None:
            raise
        raise ConfigError(f"{path}: cannot be written: {cause.strerror or cause}") from None
    return summed.sum


def sum_of(path: Path) -> FileSum:
    """The sum of a file as it is read now. OSError where it cannot be."""
    found, size, room = xxh3_64(), 0, bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(room):
            found.update(memoryview(room)[:count])
            size += count
    return FileSum(size, found.hexdigest())


def replace_file(path: Path, text: str) -> None:
    """Write to a temporary name, flush to the disk, rename, so that `path` is the old or the new one at any moment."""
    temporary = path.with_name(path.name + ".tmp")
    write_file(temporary, lambda file: file.write(text.encode()))
    temporary.replace(path)
    with contextlib.suppress(OSError):  # a file system that cannot flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class SummedWriter:
    """Writes in DeepSpeed's place, and keeps the sums of what was written. What cannot be written is told afterwards:
    a rank that raised in between would leave the others waiting for it."""

    def __init__(self) -> None:
        self.sums: dict[Path, FileSum] = {}
        self.error: ConfigError | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """As a checkpoint engine of DeepSpeed's does."""
        try:
            if self.error is None:
                self.sums[Path(path)] = write_file(
                    Path(path), lambda file: torch.save(state_dict, cast(IO[bytes], file))
                )
        except ConfigError as error:
            self.error = error

    def add(self, path: Path, content: bytes) -> None:
        """A file of the project's own. ConfigError where it cannot be written."""
        self.sums[path] = write_file(path, lambda file: file.write(content))


@contextmanager
def summed(engine: Any) -> Iterator[SummedWriter]:
    """What the engine saves goes through a writer of ours."""
    writer = SummedWriter()
    engine.checkpoint_engine.save = writer.save
    try:
        yield writer
    finally:
        del engine.checkpoint_engine.save  # the class's own


def begin_folder(folder: Path) -> None:
    """Make a new folder. One that is there, of a save that was killed as a rule, is kept under another name: files of
    ranks that are no more would be taken for the new one's. ConfigError where it cannot be made."""
    try:
        if folder.exists():
            names = (folder.with_name(f"{folder.name}.torn-{i}") for i in itertools.count(1))
            aside = next(name for name in names if not name.exists())
            folder.rename(aside)
            logger.warning("%s: was there before, unfinished or of another attempt: kept as %s", folder, aside.name)
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made: {error.strerror or error}") from None


def with_others(folder: Path, files: dict[str, FileSum]) -> dict[str, FileSum]:
    """`files`, and what DeepSpeed has copied beside them (optimizer states that it keeps on a disk) as it is read."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    try:
        return {name: sum_of(path) for name, path in names.items() if name not in files} | files
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read: {error}") from None


def write_manifest(folder: Path, files: Mapping[str, FileSum]) -> None:
    """Make the checkpoint in `folder` complete: `files` by their name in it."""
    replace_file(folder / MANIFEST, _text(files))


def read_bytes(path: Path, expected: str) -> bytes:
    """A small file of a run. ConfigError where there is none, with what was `expected`, or it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected {expected}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_manifest(folder: Path) -> dict[str, FileSum]:
    """The files of a checkpoint. ConfigError where there is no manifest, or not as it was written."""
    path = folder / MANIFEST
    text = read_bytes(path, "a complete checkpoint of this version")
    try:
        files = {name: FileSum(*one) for name, one in json.loads(text)["files"].items()}
        same = _text(files).encode() == text
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        same = False
    if not same:
        raise ConfigError(f"{path}: not as it was written (damaged data): expected a manifest with a sum of its own")
    return files


def check_share(folder: Path, files: Mapping[str, FileSum], rank: int, world: int) -> None:
    """Compare the files of which `rank` has its share, one rank's about as many bytes as another's. ConfigError for the
    first that is missing, has another size or other bytes, and for a file of tensors that is not in the manifest."""
    for path in sorted(folder.rglob("*.pt")):
        if path.relative_to(folder).as_posix() not in files:
            raise ConfigError(f"{path}: not in {MANIFEST}: expected the files of this checkpoint alone")
    for name in shares(files, world)[rank]:
        check_file(folder, name, files[name])


def shares(files: Mapping[str, FileSum], world: int) -> list[list[str]]:
    """Names of files for each rank: the largest first, each to whom has least to read."""
    found: list[list[str]] = [[] for _ in range(world)]
    load = [0] * world
    for name in sorted(files, key=lambda name: (-files[name].size, name)):
        rank = load.index(min(load))
        found[rank].append(name)
        load[rank] += files[name].size
    return found


def check_file(folder: Path, name: str, expected: FileSum) -> None:
    """ConfigError where a file of the checkpoint is not the one that was written."""
    path = folder / name
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; expected the files of every rank of the checkpoint")
        size = path.stat().st_size
        if size != expected.size:
            raise ConfigError(f"{path}: {size} bytes: expected {expected.size}, as written (damaged data)")
        found = sum_of(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    if found != expected:
        raise ConfigError(f"{path}: xxh3 {found.xxh3_64}: expected {expected.xxh3_64}, as written (damaged data)")


def _text(files: Mapping[str, FileSum]) -> str:
    """One text for one set of files, with the hash of them all, so that any change of it shows."""
    content = {name: list(files[name]) for name in sorted(files)}
    total = xxh3_64_hexdigest(json.dumps(content).encode())
    return json.dumps({"files": content, "xxh3_64": total}, indent=1) + "\n"
