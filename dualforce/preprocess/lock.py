"""One build at a time in a folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dualforce.preprocess.errors import BuildError

LOCK = "lock"


@contextmanager
def locked(folder: Path, what: Path) -> Iterator[None]:
    """Hold `folder`, which is made if it is not there. The lock dies with the process, however it ends.

    Raises BuildError, naming `what`, when another process has it. The folder may be removed while it is held.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A build that just ended may have removed the file that was opened here: whoever comes next makes another.
            same = os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK))
        except (BlockingIOError, FileNotFoundError):
            same = False
        if not same:
            raise BuildError(f"{what}: another build is at work here: wait until it is done, or stop it")
        yield
