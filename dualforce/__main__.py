"""`python -m dualforce`, and the command `dualforce`: importing this imports nothing that takes long."""

from __future__ import annotations

import os
import signal
from types import FrameType

INTERRUPTED = 130  # exit code: what a shell gives for a process ended by Ctrl-C


def main() -> None:
    """Entry point. Ctrl-C while the libraries are imported, which takes seconds, ends the process at once: an exception
    would be a traceback out of the middle of one of them, or be taken there for a library that is missing."""
    asked = signal.getsignal(signal.SIGINT)
    if asked is signal.default_int_handler:  # not where a shell has it ignored, as for a process in the background
        signal.signal(signal.SIGINT, _end)
    from dualforce import cli

    signal.signal(signal.SIGINT, asked)
    cli.main()


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
