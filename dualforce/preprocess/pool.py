"""Running tasks in processes, so that a video that kills its reader takes nothing else with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from typing import Any, Generic, TypeVar

import torch

from dualforce.codecs.memory import large_blocks_apart
from dualforce.launch import one_thread_each
from dualforce.preprocess.errors import BuildError

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S")
# Functions of a module, as they are called in other processes.
Prepare = Callable[[str], S]  # device to what a worker keeps while it lives
Work = Callable[[T, S], R]  # task and that to result


def run_tasks(
    tasks: Sequence[T], work: Work[T, S, R], devices: Sequence[str], prepare: Prepare[S]
) -> Iterator[tuple[T, R | None]]:
    """Yield every task with its result as it is done, in any order.

    There is one worker process for each entry of `devices`; it calls `prepare` once and hands what that gives to `work`
    with each of its tasks. Whichever is free takes the next task, in the order given:
    put the longest first, and no worker is left with a long one at the end. When a worker dies, another takes its place
    and its task is tried once more after all others, alone; a task whose worker dies again has the result None. What
    `work` raises is raised here. Raises BuildError when a worker dies before it can work.
    """
    waiting, failed = deque(tasks), list[T]()
    crew = [_Worker(work, prepare, device) for device in devices[: len(tasks)]]
    try:
        while waiting or any(worker.has_task for worker in crew):
            for worker in crew:
                if waiting and worker.free and worker.give(waiting[0]):
                    waiting.popleft()
            readable = wait([worker.connection for worker in crew])
            for place, worker in enumerate(crew):
                if worker.connection not in readable:
                    continue
                try:
                    yield from worker.take()
                except _DiedError:
                    failed += worker.tasks
                    worker.stop()
                    crew[place] = _Worker(work, prepare, worker.device)
    finally:
        for worker in crew:
            worker.stop()
    for task in failed:
        yield task, _alone(task, work, prepare, devices[0])


def _alone(task: T, work: Work[T, S, R], prepare: Prepare[S], device: str) -> R | None:
    """The result, with no other worker there that could take the memory; None when the process dies again."""
    worker = _Worker(work, prepare, device)
    try:
        list(worker.take())  # waits until it can work
        if worker.give(task):
            [(_, result)] = worker.take()
            return result
    except _DiedError:
        pass
    finally:
        worker.stop()
    return None


class _DiedError(Exception):
    """The process at the other end is gone."""


class _Worker(Generic[T, R]):
    """A process, and the task it has."""

    def __init__(self, work: Work[T, S, R], prepare: Prepare[S], device: str) -> None:
        context = _context(work.__module__)
        self.connection, theirs = context.Pipe()
        self.device = device
        self.tasks: list[T] = []  # the one it has, if any
        self._ready = False
        self._process: Any = context.Process(target=_serve, args=(theirs, work, prepare, device), daemon=True)  # type: ignore[attr-defined]
        with one_thread_each():  # the workers share the cores among themselves
            self._process.start()
        theirs.close()

    @property
    def has_task(self) -> bool:
        return bool(self.tasks)

    @property
    def free(self) -> bool:
        return self._ready and not self.tasks

    def give(self, task: T) -> bool:
        """Hand over a task; False when the process is gone, which `take` then says."""
        try:
            self.connection.send(task)
        except OSError:
            return False
        self.tasks = [task]
        return True

    def take(self) -> Iterator[tuple[T, R]]:
        """Read one message: its task with the result, or nothing when it said that it is ready."""
        try:
            result, error = self.connection.recv()
        except (EOFError, OSError):
            if not self._ready:
                raise BuildError("a worker process died at its start (killed, or out of memory)") from None
            raise _DiedError from None
        if error is not None:
            raise error
        if not self._ready:
            self._ready = True
            return
        task = self.tasks.pop()
        yield task, result

    def stop(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def _context(module: str) -> BaseContext:
    # Workers are forked from a server that has imported what they need and done nothing else: a copy of a process that
    # has used MediaPipe, CUDA or torch's threads can hang, and a fresh interpreter takes seconds for its imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, module])
    return context


def _serve(connection: Connection, work: Work[T, S, R], prepare: Prepare[S], device: str) -> None:
    """The life of a worker: messages are (result, None) or (None, error)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _settle(device)
        kept = prepare(device)
        connection.send((None, None))
        while True:
            try:
                task = connection.recv()
            except EOFError:
                return
            connection.send((work(task, kept), None))
    except BrokenPipeError:
        return
    except Exception as error:
        connection.send((None, error))


def _settle(device: str) -> None:
    torch.set_num_threads(1)
    large_blocks_apart()
    if device != "cpu":
        try:
            torch.cuda.set_device(device)
        except RuntimeError as error:
            cause = str(error).partition("\n")[0]
            raise BuildError(f"--devices {device}: {cause}: expected a device that can be used") from None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # nobody waits for the result; what is half written is in a folder of its own
