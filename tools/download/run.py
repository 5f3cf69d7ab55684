"""Annotations to clips: what is still to do, fetched by several workers, cut, published and remembered."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from tools.download.cut import Span, cut
from tools.download.ledger import Ledger, held
from tools.download.place import CLIPS, entry_of, file_of, put_aside
from tools.download.reasons import GONE, PASSING, SLOW_DOWN, ClipFailure, Reason
from tools.download.records import Annotations, Clip
from tools.download.ytdlp import Fetcher, Request

SCRATCH = ".scratch-"
MARGIN = Fraction(1)  # seconds fetched on either side of a clip, so that the exact cut is made here
MAX_WAIT = 900.0  # seconds


class OptionError(ValueError):
    """An option that cannot be used; one line for the user."""


@dataclass(frozen=True)
class Options:
    """`workers`: files fetched at a time; `limit`: most clips tried in this run; `tries` per file, with `wait` seconds
    before the second and four times as many before each further one; `whole`: fetch whole videos, not sections."""

    workers: int = 2
    limit: int | None = None
    retry_gone: bool = False
    whole: bool = False
    tries: int = 4
    wait: float = 15.0

    def check(self) -> None:
        """Raise OptionError for a value that cannot work."""
        if self.workers < 1:
            raise OptionError(f"--workers {self.workers}: expected at least 1")
        if self.limit is not None and self.limit < 0:
            raise OptionError(f"--limit {self.limit}: expected at least 0")
        if self.tries < 1:
            raise OptionError(f"--tries {self.tries}: expected at least 1")


@dataclass(frozen=True)
class Unit:
    """One file to fetch and the clips to cut from it."""

    video: str
    height: int | None
    section: tuple[Fraction, Fraction] | None
    clips: tuple[Clip, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a clip. `state`: got, there (from an earlier run), gone, failed or untried; `seconds` it has."""

    state: str
    reason: Reason | None = None
    message: str = ""
    seconds: float = 0.0


@dataclass
class Report:
    """The outcome of every annotated clip by name; `aside`: where the file of another annotation lies that one of them
    has, below the folder. `interrupted`: the run was stopped by hand."""

    annotations: Annotations
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    aside: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


def download(
    annotations: Annotations,
    out: Path,
    fetcher: Fetcher,
    options: Options,
    pause: Callable[[float], object] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Report:
    """Fetch what `out` lacks. Returns the outcome of every clip; one that cannot be had stops no other.

    `pause(seconds)` waits (default: until then or the end of the run); `progress(done, all)` hears of every clip.
    Raises OptionError, LedgerError, and OSError when this machine cannot go on (a full disk).
    """
    options.check()
    (out / CLIPS).mkdir(parents=True, exist_ok=True)
    with held(out):
        for stale in out.glob(f"{SCRATCH}*"):  # of a run that was killed
            shutil.rmtree(stale)
        ledger = Ledger(out, annotations.source)
        report = Report(annotations)
        work = _plan(annotations, out, ledger, options, report)
        _Run(out, ledger, fetcher, options, report, pause, progress).all(work)
    return report


def _plan(annotations: Annotations, out: Path, ledger: Ledger, options: Options, report: Report) -> list[Unit]:
    """Enter what is known into the report; returns the rest as units of work."""
    todo: list[Clip] = []
    for clip in annotations.clips:
        known = _known(clip, out, ledger, options)
        if (known is None or known.state != "there") and (aside := put_aside(out, clip, ledger)):
            report.aside[clip.name] = aside
        report.outcomes[clip.name] = known or Outcome("untried")
        if known is None and (options.limit is None or len(todo) < options.limit):
            todo.append(clip)
    return units(todo, options.whole)


def _known(clip: Clip, out: Path, ledger: Ledger, options: Options) -> Outcome | None:
    if (there := entry_of(out, clip, ledger)) is not None:
        return Outcome("there", seconds=float(there.get("seconds", 0)))
    entry = ledger.latest(clip.name)
    if entry is not None and entry["state"] == "gone" and entry.get("video") == clip.video and not options.retry_gone:
        return Outcome("gone", Reason(entry["reason"]), f"{entry.get('message', '')} ({entry['date'][:10]})")
    return None


def units(clips: list[Clip], whole: bool) -> list[Unit]:
    """One unit per clip with its section; with `whole`, one per video."""
    if not whole:
        return [
            Unit(clip.video, clip.height, (max(clip.start - MARGIN, Fraction(0)), clip.end + MARGIN), (clip,))
            for clip in clips
        ]
    groups: dict[tuple[str, int | None], list[Clip]] = {}
    for clip in clips:
        groups.setdefault((clip.video, clip.height), []).append(clip)
    return [Unit(video, height, None, tuple(group)) for (video, height), group in groups.items()]


class Pacer:
    """Lets the workers go on together when the server asks for less."""

    def __init__(self, pause: Callable[[float], object]) -> None:
        self._pause, self._lock, self._until = pause, threading.Lock(), 0.0

    def hold(self, seconds: float) -> None:
        """Nobody starts during the next `seconds`."""
        with self._lock:
            self._until = max(self._until, time.monotonic() + seconds)

    def wait(self) -> None:
        """Return when one may start."""
        with self._lock:
            rest = self._until - time.monotonic()
        if rest > 0:
            self._pause(rest)


class _Run:
    """The state that the workers of one run share."""

    def __init__(
        self,
        out: Path,
        ledger: Ledger,
        fetcher: Fetcher,
        options: Options,
        report: Report,
        pause: Callable[[float], object] | None,
        progress: Callable[[int, int], object] | None,
    ) -> None:
        self.out, self.ledger, self.fetcher, self.options, self.report = out, ledger, fetcher, options, report
        self.progress = progress or (lambda done, all: None)
        self.stop = threading.Event()
        self.pause = pause or self.stop.wait
        self.pacer = Pacer(self.pause)
        # What is gone for one clip of a video is gone for all; nobody is asked twice.
        self.gone: dict[str, ClipFailure] = {}
        if not options.retry_gone:
            for entry in ledger.entries():
                if entry["state"] == "gone":
                    failure = ClipFailure(Reason(entry["reason"]), str(entry.get("message", "")))
                    self.gone[str(entry.get("video"))] = failure

    def all(self, work: list[Unit]) -> None:
        """Do all units. An interrupt ends the run after the steps that are under way; an error of this machine as
        well, and is raised."""
        count, done = sum(len(unit.clips) for unit in work), 0
        pool = ThreadPoolExecutor(self.options.workers)
        try:
            futures = [pool.submit(self._unit, unit) for unit in work]
            for future in as_completed(futures):
                done += future.result()
                self.progress(done, count)
        except KeyboardInterrupt:
            self.report.interrupted = True
        finally:
            self.stop.set()
            pool.shutdown(cancel_futures=True)

    def _unit(self, unit: Unit) -> int:
        """Fetch and cut; returns the number of clips dealt with. An error of this machine stops the others as well."""
        if self.stop.is_set():
            return 0
        try:
            return self._fetch_and_cut(unit)
        except BaseException:
            self.stop.set()
            raise

    def _fetch_and_cut(self, unit: Unit) -> int:
        with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=self.out) as scratch:
            try:
                source = self._fetch(unit, Path(scratch))
            except ClipFailure as failure:
                if self.stop.is_set() and failure.reason in PASSING:
                    return 0  # most likely the interrupt's doing: the next run tries
                for clip in unit.clips:
                    self._fail(clip, failure)
                return len(unit.clips)
            for clip in unit.clips:
                if not self.stop.is_set():
                    self._cut(clip, source, unit.section, Path(scratch) / "clip.mp4")
        return len(unit.clips)

    def _fetch(self, unit: Unit, scratch: Path) -> Path:
        """The file of a unit; passing errors are tried again, later each time. Raises ClipFailure."""
        for attempt in range(self.options.tries):
            if unit.video in self.gone:
                raise self.gone[unit.video]
            self.pacer.wait()
            if self.stop.is_set():
                raise ClipFailure(Reason.OTHER, "the run was stopped")
            folder = scratch / f"try{attempt}"  # what a failed try left must not be taken for a result
            folder.mkdir()
            try:
                return self.fetcher.fetch(Request(unit.video, unit.height, unit.section, folder))
            except ClipFailure as failure:
                if failure.reason in GONE:
                    self.gone[unit.video] = failure
                if failure.reason not in PASSING or attempt + 1 == self.options.tries or self.stop.is_set():
                    raise
                self._back_off(failure.reason, attempt)
            shutil.rmtree(folder)
        raise AssertionError("unreachable: tries is at least 1")

    def _back_off(self, reason: Reason, attempt: int) -> None:
        seconds = min(self.options.wait * 4**attempt, MAX_WAIT)
        if reason in SLOW_DOWN:
            self.pacer.hold(seconds)
        else:
            self.pause(seconds)

    def _cut(self, clip: Clip, source: Path, section: tuple[Fraction, Fraction] | None, partial: Path) -> None:
        offset = section[0] if section else Fraction(0)
        try:
            info = cut(source, partial, Span(clip.start - offset, clip.end - offset), clip.rule)
        except ClipFailure as failure:
            self._fail(clip, failure)
            return
        except Exception as error:
            if isinstance(error, OSError):
                raise
            # A fault of a library in one strange file must not end the run for all others.
            self._fail(clip, ClipFailure(Reason.INTERNAL, f"{type(error).__name__}: {error}"))
            return
        size = publish(partial, file_of(self.out, clip))
        values: dict[str, Any] = asdict(info)
        licence = self.report.annotations.licence
        self.ledger.add(
            clip.name, "got", video=clip.video, cut=clip.cut, bytes=size, annotation_licence=licence, **values
        )
        self.report.outcomes[clip.name] = Outcome("got", seconds=info.seconds)

    def _fail(self, clip: Clip, failure: ClipFailure) -> None:
        state = "gone" if failure.reason in GONE else "failed"
        self.ledger.add(clip.name, state, video=clip.video, reason=failure.reason, message=failure.message)
        self.report.outcomes[clip.name] = Outcome(state, failure.reason, failure.message)


def publish(partial: Path, target: Path) -> int:
    """Give a complete file its final name, safe against a loss of power. Returns its bytes. Raises OSError."""
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    os.replace(partial, target)
    return size
