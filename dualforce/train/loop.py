"""The training loop: steps, validation, logging, checkpoints."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dualforce.codecs.protocols import VideoCodec
from dualforce.data.loader import StepLoader
from dualforce.train.checkpoint import SavedState, save
from dualforce.train.damage import DamageReport
from dualforce.train.metrics import RunLog, StepMetrics
from dualforce.train.sample_frames import sample_picture
from dualforce.train.step import PreparedStep, StepContext, train_step
from dualforce.train.validate import HeldOut, sample_frames, validate

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A run that is ready to train."""

    engine: Any
    context: StepContext
    loader: StepLoader[PreparedStep]
    held_out: tuple[HeldOut, ...]  # of every set that has held-out clips
    log: RunLog
    run_dir: Path
    sample_codec: Callable[[], VideoCodec] | None  # None: no sample frames are shown
    state: SavedState  # of step 0, with the damaged clips that the checkpoint counts
    tokens: tuple[int, ...]  # of both towers in a training clip of each set

    @property
    def main(self) -> bool:
        return self.context.grid.rank == 0


def train(job: Job, start: int) -> None:
    """Run the optimizer steps from `start` (steps done so far) to the end of the run or to its `stop_at`."""
    run = job.context.run.train
    stop = min(run.steps, run.stop_at or run.steps)
    metrics, clock = StepMetrics(job.context.grid), _Clock(job.loader)
    most = job.context.run.data.max_damaged
    damage = DamageReport(job.run_dir, job.loader, job.context.grid, most, start, job.state.damaged)
    if start == 0:
        _validate(job, 0)
    if start >= stop:
        logger.info("step %d of %d: nothing left to do", start, stop)
    clock.read(1)
    with _progress(job.main) as progress:
        task = progress.add_task("training", total=run.steps, completed=start)
        logged = start
        for done, prepared in enumerate(job.loader, start=start + 1):
            norm = train_step(job.engine, prepared, job.context, done - 1, metrics.add)
            progress.update(task, completed=done)
            last = done == stop
            if done % run.log_every == 0 or last:
                _log(job, metrics, clock, done, done - logged, norm, damage)
                logged = done
            with clock.paused():
                if done % run.validate_every == 0 or last:
                    _validate(job, done)
                if done % run.image_every == 0 or last:
                    _images(job, done)
                if done % run.save_every == 0 or last:
                    damage.check(done)  # no checkpoint of steps in which ranks disagreed about their clips
                    state = replace(job.state, step=done, damaged=tuple(damage.clips))
                    save(job.engine, job.run_dir, state, job.context.grid)
    job.log.close()


class _Clock:
    """Seconds and data wait per step since the last reading; validation, pictures and saving are not counted."""

    def __init__(self, loader: StepLoader[PreparedStep]) -> None:
        self._loader, self._began, self._wait = loader, time.perf_counter(), 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def read(self, steps: int) -> tuple[float, float]:
        """(seconds, seconds waited for data) a step over the last `steps` steps."""
        now, wait = time.perf_counter(), self._loader.wait_seconds
        values = (now - self._began) / steps, (wait - self._wait) / steps
        self._began, self._wait = now, wait
        return values


def _log(job: Job, metrics: StepMetrics, clock: _Clock, step: int, steps: int, norm: Any, damage: DamageReport) -> None:
    values = metrics.read(steps)  # waits for the device, so the seconds below are the device's
    values["damaged_clips"] = damage.check(step)
    seconds, waited = clock.read(steps)
    run = job.context.run
    values["grad_norm"] = float(norm)
    values["learning_rate"] = job.engine.get_lr()[0]
    values["seconds_per_step"], values["data_wait"] = seconds, waited
    done = sum(job.tokens[job.loader.bucket_of_step(one)] for one in range(step - steps, step))
    values["tokens_per_second"] = run.data.clips_per_step * done / (steps * seconds)
    job.log.write("train", step, values)
    if not all(math.isfinite(values[name]) for name in ("total", "grad_norm")):
        logger.warning("step %d: loss %s, gradient norm %s", step, values["total"], values["grad_norm"])


def _validate(job: Job, step: int) -> None:
    if not job.held_out:
        return
    values = validate(job.engine, job.held_out, job.context)
    job.log.write("validation", step, values)
    logger.info(
        "step %d: validation video %.4f (linear predictor %.4f, zero %.4f), struct %.4f",
        step, values["video"], values["video_linear"], values["video_zero"], values["struct"],
    )  # fmt: skip


def _images(job: Job, step: int) -> None:
    """Rows: clean, noised, denoised in one step; columns: the middle pixel frame and the last; of the first clip."""
    if not job.held_out or job.sample_codec is None:
        return
    latents = sample_frames(job.engine, job.held_out[0], job.context)
    if not job.main:
        return
    rows = {name: latents[name] for name in ("clean", "noised", "denoised")}
    try:
        picture = sample_picture(job.sample_codec(), job.held_out[0].statistics, rows)
    except torch.OutOfMemoryError:  # a picture less is no reason to end a run
        logger.warning("step %d: no sample frames: too little memory is free on the GPU to decode them", step)
        return
    job.log.image("validation/frames", step, picture)


def _progress(visible: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not visible)
