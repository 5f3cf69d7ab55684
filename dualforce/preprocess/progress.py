"""How far a build is, how fast it goes and when it will be done: bars on a terminal, else a line every half minute."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

T = TypeVar("T")
EVERY = 30.0  # seconds between plain lines


class Meter:
    """Counts videos done. The time left follows from bytes, not from videos, as the largest come first."""

    def __init__(self, total: int, total_bytes: int, now: float) -> None:
        self.total, self.done = total, 0
        self._bytes_left, self._bytes, self._hours, self._begun = total_bytes, 0, 0.0, now

    def add(self, size: int, length: float) -> None:
        """Count a video of `size` bytes and `length` seconds."""
        self.done += 1
        self._bytes += size
        self._bytes_left -= size
        self._hours += length / 3600

    def rate(self, now: float) -> str:
        """ "0.50 videos/s, 1.2 h of video per hour, 0:03:20 left"; empty before the first video is done."""
        elapsed = now - self._begun
        if not self.done or elapsed <= 0:
            return ""
        speed = f"{self.done / elapsed:.2f} videos/s, {self._hours / (elapsed / 3600):.1f} h of video per hour"
        return f"{speed}, {clock(elapsed * self._bytes_left / max(1, self._bytes))} left"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class BuildProgress:
    """Shows one stage after the other on a console. Use as a context manager."""

    def __init__(self, console: Console, every: float = EVERY) -> None:
        self._console = console
        columns = (
            TextColumn("{task.description:<18}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self._every = every
        self._line = ""
        self._meter: Meter | None = None
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> BuildProgress:
        self._bars.start()
        self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._ticker.join()
        self._bars.stop()

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def track(self, items: Iterable[T], total: int, title: str) -> Iterator[T]:
        """The items, counted under a title."""
        task = self._bars.add_task(title, total=total, rate="")
        for done, item in enumerate(items):
            self._line = f"{title}: {done} of {total}"
            yield item
            self._bars.advance(task)
        self._line = ""

    def videos(self, results: Iterable[tuple[T, int, float]], total: int, total_bytes: int) -> Iterator[T]:
        """The first part of each result as it comes; the others are the size of its video in bytes and its length in
        seconds, for the rate."""
        title = "videos to samples"
        self._meter = Meter(total, total_bytes, time.monotonic())
        task = self._bars.add_task(title, total=total, rate="")
        self._line = f"{title}: 0 of {total}"
        for item, size, length in results:
            self._meter.add(size, length)
            self._line = f"{title}: {self._meter.done} of {total}"
            self._bars.update(task, advance=1, rate=self._meter.rate(time.monotonic()))
            yield item
        self._line, self._meter = "", None

    def _tick(self) -> None:
        while not self._console.is_terminal and not self._over.wait(self._every):
            line, meter = self._line, self._meter
            rate = meter.rate(time.monotonic()) if meter else ""
            if line:
                self.say(f"{line}, {rate}" if rate else line)
