"""Builds that are killed at many points and started again: `python -m helpers.killed_builds CASE.json`.

The process imports everything once and forks each build, so that a start costs milliseconds. A build runs in a process
group of its own, which SIGKILL ends as a whole: after a time, or at its n-th step towards the disk (a sync, a rename, a
removal, in the build or a worker). What happened is written to the case's `log`, one line for each video worked on, and
printed as JSON: how each build ended.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from rich.console import Console

from dualforce.preprocess import build, lock, pool, work

QUIET = Console(quiet=True)


def main(case: dict[str, Any]) -> None:
    src, out, log = (Path(case[name]) for name in ("src", "out", "log"))
    options = build.BuildOptions(size=64, workers=case["workers"])
    pool._context = lambda module: multiprocessing.get_context("fork")  # type: ignore[assignment]
    work.process_video = logged(work.process_video, log)
    begun = time.monotonic()
    assert run(src, Path(case["undisturbed"]), options, None, None) == 0
    whole = time.monotonic() - begun
    log.unlink()
    draw = random.Random(case["seed"])
    kills, sets = [], 1
    while len(kills) < case["kills"]:
        # Half of the kills by time, so short that there is always work left; half at a step of the process that first
        # takes so many: a worker takes 8 for each video, and the build some 40 when all videos are done.
        seconds = draw.uniform(0, 2 * whole / case["kills"]) if len(kills) % 2 == 0 else None
        step = None if len(kills) % 2 == 0 else draw.randrange(1, 45)
        code = run(src, out / str(sets), options, seconds, step)
        if code == -signal.SIGKILL:
            complete = (out / str(sets) / "manifest.json").exists()
            kills.append({"set": sets, "seconds": seconds, "step": step, "complete": complete})
        elif code == 0:
            sets += 1  # done before it was killed: the next kills go to a new set
        else:
            raise SystemExit(f"a build ended with exit code {code}")
    assert run(src, out / str(sets), options, None, None) == 0
    print(json.dumps({"kills": kills, "sets": sets, "seconds": whole}))


def every_step(case: dict[str, Any]) -> None:
    """Kill a build whose videos are all done at its first step, its second, and so on, and let it end each time: sets
    OUT/1, OUT/2, ... Prints how many steps there were, and at which the set was complete first."""
    src, out, base = (Path(case[name]) for name in ("src", "out", "base"))
    options = build.BuildOptions(size=64, workers=case["workers"])
    pool._context = lambda module: multiprocessing.get_context("fork")  # type: ignore[assignment]
    assert run(src, Path(case["undisturbed"]), options, None, None) == 0
    original, build.assemble = build.assemble, lambda *_: os._exit(0)  # type: ignore[assignment]
    assert run(src, base, options, None, None) == 0
    build.assemble = original
    steps, complete = 0, []
    while True:
        target = out / str(steps + 1)
        shutil.copytree(base, target)
        code = run(src, target, options, None, steps + 1)
        if code == 0:
            break
        steps += 1
        complete.append((target / "manifest.json").exists())
        assert code == -signal.SIGKILL and run(src, target, options, None, None) == 0
    print(json.dumps({"steps": steps, "complete": complete}))


def run(src: Path, out: Path, options: build.BuildOptions, seconds: float | None, step: int | None) -> int:
    """Exit code of a build, -9 when it was killed."""
    child = os.fork()
    if child == 0:
        os.setsid()
        if step is not None:
            kill_at(step)
        try:
            build.build_shards(src, out, options, QUIET)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:  # between fork and setsid, or over
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    wait_for_lock(out / work.FOLDER / lock.LOCK)
    return os.waitstatus_to_exitcode(status)


def wait_for_lock(path: Path) -> None:
    """Forked workers hold their parent's lock too, and die a moment later. (Those of a real build do not have it.)"""
    if path.exists():
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX)


def kill_at(step: int) -> None:
    """The process that takes its n-th step towards the disk kills its group, before the step or after it."""
    count = 0

    def stepping(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            own = count  # Path.unlink is a step, and calls os.unlink, which is another
            if own == step and step % 2:
                os.killpg(0, signal.SIGKILL)
            try:
                return function(*args, **kwargs)
            finally:
                if own == step:
                    os.killpg(0, signal.SIGKILL)

        return wrapped

    os.fsync, os.replace, os.rmdir, os.unlink = map(stepping, (os.fsync, os.replace, os.rmdir, os.unlink))
    Path.rename, Path.unlink = stepping(Path.rename), stepping(Path.unlink)  # type: ignore[method-assign]
    shutil.rmtree = stepping(shutil.rmtree)  # type: ignore[assignment]


def logged(process: Callable[..., Any], log: Path) -> Callable[..., Any]:
    """`process`, which first writes down the video's hash, and whether its result was there already."""

    def wrapped(job: Any, models: Any) -> Any:
        base = job.scratch.parents[1]
        done = [path.name for path in (base / work.RESULTS).iterdir()]
        entry = {"set": base.parent.name, "sha256": job.sha256, "redone": job.scratch.name in done}
        with open(log, "a") as file:
            file.write(json.dumps(entry) + "\n")
        return process(job, models)

    return wrapped


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    every_step(given) if "base" in given else main(given)
