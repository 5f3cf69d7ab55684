"""Reads shard sets that may be hostile, and reports what happened: `python -m helpers.hostile_child FOLDER`.

A process of its own, because an audit hook cannot be removed and a fault may end the process. One JSON line per set.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from data_shards.reader import ShardSet
from data_shards.schema import ShardError

FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen",
             "pickle.find_class", "marshal.loads", "marshal.load", "ctypes.dlopen", "socket.connect", "exec", "compile",
             "import", "urllib.Request", "shutil.unpack_archive", "os.link", "os.symlink", "os.rename")  # fmt: skip


class Watch:
    """Counts, through the audit hook, what a reader of shards has no business to do."""

    def __init__(self) -> None:
        self.root = ""
        self.found: list[str] = []

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.root:
            return
        if event == "open" and not isinstance(arguments[0], int) and not self._inside(arguments[0]):
            self.found.append(f"open {arguments[0]!r}")
        elif event in FORBIDDEN:
            self.found.append(f"{event} {str(arguments)[:200]}")

    def _inside(self, path: Any) -> bool:
        # Resolved, so that a link that was followed out of the folder counts.
        return isinstance(path, str | bytes) and os.path.realpath(os.fsdecode(path)).startswith(self.root + os.sep)


def read_everything(root: Path) -> str:
    """The message of the ShardError, or "" if the set reads to its end."""
    try:
        opened = ShardSet.open(root)
        for split in ("train", "validation"):
            reader = opened.split(split)
            for index in range(len(reader)):
                reader.read(index, 1)
                reader.read(index)
        opened.verify()
    except ShardError as error:
        return str(error)
    return ""


def memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def main(folder: Path) -> None:
    for warm in ("good", "warm"):  # what is imported on first use is imported here
        read_everything(folder / warm)
    watch = Watch()
    sys.addaudithook(watch)
    for root in sorted(path for path in folder.iterdir() if path.is_dir() and path.name not in ("good", "warm")):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = memory("VmRSS")
        watch.found, watch.root, kind = [], os.path.realpath(root), "ShardError"
        began, began_work = time.perf_counter(), time.process_time()
        try:
            message = read_everything(root)
        except BaseException as error:  # reported, as the fault that it is
            message, kind = f"{type(error).__name__}: {error}"[:500], "crash"
        # Work, because another process may hold the processor up; and the clock, because a pipe may block.
        work, seconds, watch.root = time.process_time() - began_work, time.perf_counter() - began, ""
        grown = memory("VmHWM") - before
        outcome = {"name": root.name, "kind": kind if message else "read", "message": message, "work": work,
                   "seconds": seconds, "bytes": grown, "forbidden": watch.found}  # fmt: skip
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
