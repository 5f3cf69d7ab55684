"""The memory of a download folder: one JSON line per event of a clip, only ever appended; the last line of a state
counts. A line "aside" is a notice: where the file lies that was in the place of the clip.

A line is complete or absent: each is one write, followed by fsync; a torn end (the machine lost power) is cut off at
the next start. One process at a time holds the folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tools.download.reasons import Reason

LEDGER = "ledger.jsonl"
LOCK = ".lock"
STATES = ("got", "gone", "failed")
NOTICE = "aside"


class LedgerError(ValueError):
    """A ledger that cannot be used; one line for the user."""


class Ledger:
    """The ledger of a folder, open for appending. Use inside `held`."""

    def __init__(self, folder: Path, source: str) -> None:
        """Raises LedgerError for a damaged ledger or one of another set than `source`."""
        self.path, self.source = folder / LEDGER, source
        self._lock = threading.Lock()
        self._latest: dict[str, dict[str, Any]] = {}
        self._last: dict[tuple[str, str], dict[str, Any]] = {}  # by clip and state
        self._cut_torn_end()
        if self.path.exists():
            for number, line in enumerate(self.path.read_bytes().split(b"\n")[:-1], 1):
                self._take(self._checked(line, number))

    def latest(self, clip: str) -> dict[str, Any] | None:
        """The last entry of a clip's state."""
        return self._latest.get(clip)

    def got(self, clip: str) -> dict[str, Any] | None:
        """The last entry of a file that a clip had."""
        return self._last.get((clip, "got"))

    def notice(self, clip: str) -> dict[str, Any] | None:
        """The last notice of a clip; its `file` is a path below the folder."""
        return self._last.get((clip, NOTICE))

    def entries(self) -> list[dict[str, Any]]:
        """The last entry of every clip's state."""
        return list(self._latest.values())

    def add(self, clip: str, state: str, **values: Any) -> None:
        """Append an entry, dated now. Raises OSError if it cannot be stored; then nothing of it is left."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        entry = {"clip": clip, "source": self.source, "state": state, "date": date, **values}
        data = json.dumps(entry).encode() + b"\n"
        with self._lock:
            self._append(data)
            self._take(entry)

    def _take(self, entry: dict[str, Any]) -> None:
        self._last[entry["clip"], entry["state"]] = entry
        if entry["state"] != NOTICE:
            self._latest[entry["clip"]] = entry

    def _append(self, data: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            try:
                if os.write(descriptor, data) != len(data):
                    raise OSError(f"{self.path}: cannot be written: the disk is full")
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)

    def _cut_torn_end(self) -> None:
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        if not data.endswith(b"\n"):
            os.truncate(self.path, data.rfind(b"\n") + 1)

    def _checked(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not _complete(entry):
            raise LedgerError(
                f"{self.path}:{number}: expected a JSON object with clip, state ({', '.join((*STATES, NOTICE))}), date "
                "and reason"
            )
        if entry.get("source") != self.source:
            raise LedgerError(
                f"{self.path}:{number}: source = {entry.get('source')!a}: expected {self.source!r}; "
                "give every set a folder of its own"
            )
        return entry


def _complete(entry: Any) -> bool:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("clip", "date")):
        return False
    if entry.get("state") == NOTICE:
        return isinstance(entry.get("file"), str)
    return entry.get("state") == "got" or (entry.get("state") in STATES and entry.get("reason") in list(Reason))


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes; the lock dies with the process. Raises LedgerError if another has it."""
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LedgerError(f"{folder}: another download is running there") from None
        yield
