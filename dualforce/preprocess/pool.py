"""Running jobs in processes, so that a video that kills its reader takes nothing else with it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import torch

from dualforce.preprocess.process import Job, Outcome, process_video, rejection
from dualforce.preprocess.reasons import Reason


def run_jobs(jobs: list[Job], workers: int) -> Iterator[Outcome]:
    """Yield the outcome of every job as it is done, in any order. One worker runs them in this process; more are
    fresh processes. When one of those dies, the jobs not done are run again alone, and one that dies again is rejected
    with E_CRASH."""
    if workers == 1:
        yield from map(process_video, jobs)
        return
    done: set[str] = set()
    with _pool(min(workers, max(1, len(jobs)))) as pool:
        # The largest files first, so that no worker is left with a long one at the end.
        futures = [pool.submit(process_video, job) for job in sorted(jobs, key=lambda job: -job.bytes)]
        for future in as_completed(futures):
            if isinstance(future.exception(), BrokenProcessPool):
                continue
            done.add(future.result().source)
            yield future.result()
    for job in jobs:
        if job.source not in done:
            yield _alone(job)


def _alone(job: Job) -> Outcome:
    with _pool(1) as pool:
        try:
            return pool.submit(process_video, job).result()
        except BrokenProcessPool:
            detail = "the process that read it died (killed, out of memory, or a fault in a decoder)"
            return Outcome(job.source, (), (rejection(job.source, Reason.E_CRASH, detail),))


def _pool(workers: int) -> ProcessPoolExecutor:
    # "spawn": a forked copy of a process that has used MediaPipe or torch threads can hang.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_one_thread)


def _one_thread() -> None:
    torch.set_num_threads(1)  # the workers share the cores among themselves
