"""Workers share one queue; a task that kills its process costs itself only, and only when it does so twice."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from dualforce.launch import THREAD_COUNTS
from dualforce.preprocess import pool
from dualforce.preprocess.errors import BuildError
from dualforce.preprocess.pool import run_tasks

TESTS = Path(__file__).resolve().parents[1]
T = TypeVar("T")


def measure(task: str, device: str) -> tuple[str, str, int, int]:
    """(task, device, process, threads); a task called "deadly" kills its process, and "once PATH" the first time."""
    if task == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    if task.startswith("once "):
        mark = Path(task.removeprefix("once "))
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    if task.startswith("sleep"):
        time.sleep(0.5)
    if task == "raise":
        raise OSError(28, "No space left on device")
    return task, device, os.getpid(), torch.get_num_threads()


def test_a_dead_worker_costs_its_task_only(tmp_path: Path) -> None:
    """The deadly task is tried twice; one that dies by accident gets its result; the others are worked on meanwhile."""
    once = f"once {tmp_path / 'mark'}"
    tasks = ["deadly", once, "a", "b", "c", "d"]
    found = dict(run_tasks(tasks, measure, ["cpu", "cpu"], str))
    assert set(found) == set(tasks) and set(list(found)[:4]) == set("abcd")
    assert found.pop("deadly") is None
    assert all(result is not None and result[0] == task for task, result in found.items())
    assert all(result is not None and result[3] == 1 for result in found.values())


def test_whoever_is_free_takes_the_next_task() -> None:
    tasks = ["sleep", "a", "b", "c", "d", "e"]
    found = dict(run_tasks(tasks, measure, ["cpu", "cpu"], str))
    workers = {task: result[2] for task, result in found.items() if result}
    assert len(set(workers.values())) == 2
    assert len({workers[task] for task in "abcde"} - {workers["sleep"]}) == 1
    assert sum(workers[task] != workers["sleep"] for task in "abcde") >= 4


def test_what_the_work_raises_is_raised() -> None:
    with pytest.raises(OSError, match="No space left"):
        list(run_tasks(["a", "raise", "b"], measure, ["cpu"], str))


def test_a_worker_that_cannot_start_is_an_error_and_no_endless_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_serve", die)
    with pytest.raises(BuildError, match="died at its start"):
        list(run_tasks(["a", "b"], measure, ["cpu"], str))


def die(*_: object) -> None:
    os._exit(3)


def settings(task: str, device: str) -> tuple[str | None, ...]:
    return tuple(os.environ.get(name) for name in THREAD_COUNTS)


def test_libraries_of_a_worker_get_one_thread_and_those_here_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.setattr(pool, "_context", lambda module: multiprocessing.get_context("spawn"))
    assert list(run_tasks(["a"], settings, ["cpu"], str)) == [("a", ("1",) * len(THREAD_COUNTS))]
    assert os.environ["OMP_NUM_THREADS"] == "7" and "MKL_NUM_THREADS" not in os.environ


def test_every_worker_has_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_context", lambda module: multiprocessing.get_context("fork"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: monkeypatch.setenv("CHOSEN", device))
    found = dict(run_tasks(["sleep 1", "sleep 2", "a"], with_devices, ["cuda:0", "cuda:1"], str))
    assert {found["sleep 1"], found["sleep 2"]} == {"cuda:0", "cuda:1"} and found["a"] in ("cuda:0", "cuda:1")
    assert "CHOSEN" not in os.environ  # chosen in the worker, not here


def test_a_device_that_cannot_be_used_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(device: str) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy\nCUDA kernel errors might ...")

    monkeypatch.setattr(pool, "_context", lambda module: multiprocessing.get_context("fork"))
    monkeypatch.setattr(torch.cuda, "set_device", busy)
    with pytest.raises(BuildError) as caught:
        list(run_tasks(["a"], with_devices, ["cuda:1"], str))
    assert str(caught.value).startswith("--devices cuda:1: CUDA error: all CUDA-capable devices are busy: expected")
    assert "\n" not in str(caught.value)


def with_devices(task: str, device: str) -> str:
    time.sleep(0.5 if task.startswith("sleep") else 0)
    return device if os.environ["CHOSEN"] == device else "not chosen"


def test_no_tasks_need_no_worker() -> None:
    assert list(run_tasks([], measure, ["cpu"], str)) == []


def note_and_sleep(task: str, device: str) -> str:
    Path(task).write_text(str(os.getpid()))
    time.sleep(600)
    return task


def test_workers_end_with_whoever_started_them(tmp_path: Path) -> None:
    """Killed as by the kernel, with no chance to say so: the worker ends in the middle of its task."""
    code = f"""
from preprocess.test_pool import note_and_sleep
from dualforce.preprocess.pool import run_tasks
list(run_tasks([{str(tmp_path / "pid")!r}], note_and_sleep, ["cpu"], str))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    parent = subprocess.Popen([sys.executable, "-c", code], env=environment)
    worker = int(until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text()))
    assert alive(worker)
    parent.kill()
    parent.wait()
    until(lambda: not alive(worker))


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(found: Callable[[], T], seconds: float = 60) -> T:
    """What `found` gives as soon as that counts as true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.02)
    raise TimeoutError
