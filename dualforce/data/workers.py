"""Processes that read and collate steps for one rank of the trainer."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

import torch
import torch.multiprocessing  # tensors then go through pipes as shared memory

from data_shards.files import Folder
from data_shards.reader import ShardReader, ShardSet
from data_shards.schema import ShardError
from dualforce.data.handover import hand_over, taken
from dualforce.data.order import worker_of
from dualforce.data.steps import Deal, StepRead, StepReader

LEAVE_SECONDS = 10.0  # for a process to come to the end of the step that it reads
SIGNAL_HINTS = {"SIGKILL": "is memory short?", "SIGBUS": "is /dev/shm too small? a container takes --shm-size"}


class LoaderError(RuntimeError):
    """A loader process ended by itself; the message is one line for the user."""


class Split(NamedTuple):
    """A split of a shard set as a process of its own opens it; nothing of the index goes from process to process."""

    source: Folder
    name: str
    hash: str  # of the set

    def open(self) -> ShardReader:
        """ShardError where the set cannot be opened, or is no longer the one with this hash."""
        shards = ShardSet.open(self.source)
        if shards.hash != self.hash:
            raise ShardError(f"{self.source}: hash {shards.hash}: expected {self.hash}, the set as the run opened it")
        return shards.split(self.name)


class WorkerPool:
    """`count` processes that read the `steps` of a rank by turns; `take` gives them in order.

    Each has a pipe of its own, on which it is asked for one step after the other, and gives micro-batches in shared
    memory. As nobody else holds the ends of that pipe, a process that dies is noticed at once, whatever it was at, and
    the processes of a trainer that dies end by themselves, even if it was killed.
    """

    def __init__(self, splits: Sequence[Split], deal: Deal, steps: range, count: int) -> None:
        # Not forked from the trainer: its threads and its CUDA context would come along. The server that forks them
        # imports torch once for all.
        served = "forkserver" in multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver") if served else multiprocessing.get_context("spawn")
        if served:
            context.set_forkserver_preload(["torch"])
        self._steps, self._count, self._end = iter(steps), count, steps.stop
        self._stop, self._stopped = context.Pipe(duplex=False)[::-1]
        self._pipes: list[Connection] = []
        self._processes = []
        for number in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, splits, deal), name=f"dualforce-loader-{number}", daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        for step in steps[:count]:
            self._ask(step)
        self._further = iter(steps[count:])

    def take(self) -> StepRead | None:
        """The next step, or None once stopped. Raises LoaderError where the process that reads it has ended."""
        step = next(self._steps)
        number = worker_of(step, self._count)
        pipe = self._pipes[number]
        if self._stopped in wait([pipe, self._stopped]):
            return None
        try:
            handover, damaged, fault = pipe.recv()
        except (EOFError, OSError) as error:
            raise LoaderError(self._what_happened(number, error)) from None
        further = next(self._further, None)
        if further is not None:
            self._ask(further)
        return StepRead(taken(handover), damaged, fault)

    def stop(self, taker: threading.Thread) -> None:
        """Let `take` return in the thread that calls it, and wait for the end of that thread. A process that hangs in
        the middle of handing a step over is killed."""
        self._stop.close()
        taker.join(LEAVE_SECONDS)
        if taker.is_alive():
            for process in self._processes:
                process.kill()
            taker.join()

    def close(self) -> None:
        """End the processes and wait for them, after `stop`."""
        for pipe in (self._stop, self._stopped, *self._pipes):
            pipe.close()
        for process in self._processes:
            process.join(LEAVE_SECONDS)
            if process.exitcode is None:
                process.kill()
                process.join()

    def _ask(self, step: int) -> None:
        with suppress(OSError):  # it has ended, which is said when its next step is taken
            self._pipes[worker_of(step, self._count)].send((step, range(step + self._count, self._end, self._count)))

    def _what_happened(self, number: int, error: Exception) -> str:
        process = self._processes[number]
        process.join(LEAVE_SECONDS)
        code = process.exitcode
        if code is None:
            what = f"cannot be read from ({error})"
        elif code >= 0:
            what = f"ended by exit code {code} (its traceback is above)"
        else:
            name = {one.value: one.name for one in signal.Signals}.get(-code, f"signal {-code}")
            what = f"ended by {name} ({SIGNAL_HINTS.get(name, 'see the log of the system')})"
        return (
            f"data.workers: loader process {number + 1} of {self._count} (pid {process.pid}) {what}: "
            "expected it to live as long as the run; go on from the last checkpoint with --resume"
        )


def _serve(pipe: Connection, splits: Sequence[Split], deal: Deal) -> None:
    """Body of a loader process: what it read of every step asked for, until the trainer closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # meant for the trainer, which closes the pipe
    torch.set_num_threads(1)
    try:
        read = StepReader([one.open() for one in splits], [one.hash for one in splits], deal).read
    except ShardError as error:
        read = partial(_failed, error)
    while (asked := _asked(pipe)) is not None:
        _give(pipe, read(*asked))


def _asked(pipe: Connection) -> tuple[int, range] | None:
    """A step, and those that this process will be asked for after it."""
    try:
        step, then = pipe.recv()
        return step, then
    except (EOFError, ConnectionError):
        return None


def _give(pipe: Connection, found: StepRead) -> None:
    with suppress(ConnectionError):  # the trainer has gone, as the next look for a step will find
        pipe.send((hand_over(found.batches), found.damaged, found.fault))


def _failed(fault: ShardError, step: int, then: range) -> StepRead:
    return StepRead([], [], fault)
