"""A disk that is full after some bytes of each file of a checkpoint."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast
from unittest import mock

from dualforce.train import manifest
from dualforce.train.manifest import SummedFile


class _Full:
    def __init__(self, file: IO[bytes], room: int) -> None:
        self._file, self._room = file, room

    def write(self, data: Any) -> int:
        self._room -= memoryview(data).nbytes
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(data)


@contextmanager
def full_after(room: int) -> Iterator[None]:
    """Files of checkpoints take `room` bytes each."""

    def summed(file: IO[bytes]) -> SummedFile:
        return SummedFile(cast(IO[bytes], _Full(file, room)))

    with mock.patch.object(manifest, "SummedFile", summed):
        yield
