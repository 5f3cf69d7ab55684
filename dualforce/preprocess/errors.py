"""Why a build stops, in one line for the user."""

from __future__ import annotations

import errno

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class BuildError(ValueError):
    """A build that cannot start, cannot go on, or gave nothing; one line for the user."""


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that nothing more can be written: no fault of the video at hand."""
    return isinstance(error, OSError) and error.errno in DISK_FULL
