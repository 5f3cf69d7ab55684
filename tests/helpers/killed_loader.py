"""A rank that trains as the command line says while its first loader process is killed."""

from __future__ import annotations

import multiprocessing
import threading
import time

from dualforce.train.__main__ import main as train


def main() -> None:
    """Kill the process as soon as it is there, and train."""
    threading.Thread(target=_kill, daemon=True).start()
    train()


def _kill() -> None:
    while not (found := [one for one in multiprocessing.active_children() if one.name == "dualforce-loader-0"]):
        time.sleep(0.01)
    found[0].kill()
