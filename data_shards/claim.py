"""Which files in a folder are those of a set that is being written there, so that whoever writes removes no others.

A mark in the folder names the shards that are begun, each before its first file. What a killed process has left is told
by it: the next one that writes there clears that away, and refuses shards that the mark does not name. The first line
is of one writer alone: one that was taken for killed sees that the folder is another's now, and leaves it as it is.
"""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

from data_shards.index import INDEX_NAME
from data_shards.manifest import MANIFEST_NAME
from data_shards.schema import ShardError
from data_shards.shard import own_files

MARK = ".building"
_ALWAYS = tuple(name.partition(".")[0] for name in (INDEX_NAME, MANIFEST_NAME))


class Claim:
    """A folder in which one process writes a set."""

    def __init__(self, root: Path) -> None:
        """Claim `root`, a folder, and remove what a killed process that had claimed it has left.

        Raises ShardError for a set, and for files with the names of shards that no such process has made.
        """
        check_free(root)
        self._root, self._mark = root, root / MARK
        self._stems = set(_read(self._mark))
        for path in own_files(root):
            if _stem(path) not in self._stems:
                raise ShardError(
                    f"{path}: exists, without a manifest, and no interrupted build has made it: expected a new or "
                    "empty folder"
                )
        self._remove()
        self._stems, self._own = set(), f"writer-{uuid.uuid4().hex}"
        try:
            self._append(self._own, *_ALWAYS)
        except OSError:
            self._remove()
            raise

    def check(self) -> None:
        """Raise ShardError where another process has claimed the folder since."""
        if not self._is_ours():
            raise ShardError(
                f"{self._root}: another process writes a set here now, or has: expected a folder of its own"
            )

    def add(self, *stems: str) -> None:
        """Say that files of these shards ("train-000000") will be made. Raises ShardError as `check`."""
        self.check()
        self._append(*stems)

    def _is_ours(self) -> bool:
        return _read(self._mark)[:1] == [self._own]

    def _append(self, *stems: str) -> None:
        with open(self._mark, "a", encoding="ascii") as file:
            file.write("".join(f"{stem}\n" for stem in stems))
            file.flush()
            os.fsync(file.fileno())  # as the shards are: after a power cut they are told from those of others
        self._stems.update(stems)

    def release(self) -> None:
        """The set is complete: nothing in the folder is to be removed any more."""
        self._mark.unlink()

    def clear(self) -> None:
        """Remove what was made of a set that does not come to be; its manifest first, as a folder with one is whole."""
        if self._is_ours():
            (self._root / MANIFEST_NAME).unlink(missing_ok=True)  # there was none when the folder was claimed
            self._remove()

    def _remove(self) -> None:
        for path in own_files(self._root):
            if _stem(path) in self._stems:
                path.unlink()
        self._mark.unlink(missing_ok=True)


def check_free(root: Path) -> None:
    """Raise ShardError if a set is in the folder `root`."""
    if (root / MANIFEST_NAME).exists():
        raise ShardError(f"{root / MANIFEST_NAME}: a shard set exists here: expected a new or empty folder")


def _read(mark: Path) -> list[str]:
    with suppress(FileNotFoundError):
        return mark.read_text(encoding="ascii", errors="replace").splitlines()
    return []


def _stem(path: Path) -> str:
    return path.name.partition(".")[0]
