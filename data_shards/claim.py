"""Which files in a folder are those of a set that is being written there, so that whoever writes removes no others.

A mark in the folder names the shards that are begun, each before its first file. What a killed process has left is told
by it: the next one that writes there clears that away, and refuses shards that the mark does not name.
"""

from __future__ import annotations

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
        self.clear()
        self._stems = set()
        try:
            self.add(*_ALWAYS)
        except OSError:
            self.clear()
            raise

    def add(self, *stems: str) -> None:
        """Say that files of these shards ("train-000000") will be made."""
        with open(self._mark, "a", encoding="ascii") as file:
            file.write("".join(f"{stem}\n" for stem in stems))
        self._stems.update(stems)

    def release(self) -> None:
        """The set is complete: nothing in the folder is to be removed any more."""
        self._mark.unlink()

    def clear(self) -> None:
        """Remove what was made of a set that does not come to be."""
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
