"""Long arrays in a file: what a long video's sound and features are kept in, so that memory holds a part at a time."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


class DiskRows:
    """Rows [N, *shape] of one type in an unnamed temporary file, which is gone when it is closed or the process ends.

    Written anywhere, in any order: rows that were skipped are zeros. A slice is read into memory as an array of its
    own, so that what counts as memory of the process is what was asked for (pages of a mapped file would count too).
    """

    def __init__(self, folder: Path, dtype: np.dtype[Any], shape: tuple[int, ...] = ()) -> None:
        """Raises OSError when no file can be made in `folder`."""
        self._dtype, self._shape = dtype, shape
        self._row = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        self._rows = 0
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by `close`)

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, part: slice) -> NDArray[Any]:
        """Rows [start, stop), as far as there are such. Raises ValueError for a step."""
        start, stop, step = part.indices(self._rows)
        if step != 1:
            raise ValueError(f"rows {part}: expected a step of 1")
        found = np.empty((max(0, stop - start), *self._shape), self._dtype)
        if found.nbytes:
            self._file.seek(start * self._row)
            if self._file.readinto(found.reshape(-1).view(np.uint8).data) != found.nbytes:
                raise OSError(f"{self._file.name}: shorter than it was written")
        return found

    def append(self, rows: NDArray[Any]) -> None:
        """Write rows [n, *shape] after the last one. Raises OSError when the disk is full."""
        self.write(self._rows, rows)

    def write(self, first: int, rows: NDArray[Any]) -> None:
        """Write rows [n, *shape] from row `first` on. Raises ValueError for rows of another type or shape, OSError when
        the disk is full."""
        if rows.dtype != self._dtype or rows.shape[1:] != self._shape:
            raise ValueError(f"rows {rows.shape} {rows.dtype}: expected [n, *{self._shape}] {self._dtype}")
        if len(rows):
            self._file.seek(first * self._row)
            self._file.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
            self._file.flush()  # a full disk is said here, not by a later reading
            self._rows = max(self._rows, first + len(rows))

    def close(self) -> None:
        """Remove the file."""
        self._file.close()
