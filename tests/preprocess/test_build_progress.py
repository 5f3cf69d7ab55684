"""Rate and time left, and what is shown where there is no terminal."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator

from rich.console import Console

from dualforce.preprocess.progress import BuildProgress, Meter, clock


def test_rate_and_time_left() -> None:
    """The time left follows from bytes: the largest videos come first, the many small ones that are left are quick."""
    meter = Meter(total=100, total_bytes=1000, now=50.0)
    assert meter.rate(60.0) == ""
    meter.add(400, 1800.0)
    meter.add(400, 1800.0)
    assert meter.rate(50.0 + 400) == "0.01 videos/s, 9.0 h of video per hour, 0:01:40 left"
    meter.add(200, 0.0)
    assert meter.rate(50.0 + 400).endswith(", 0:00:00 left")


def test_clock() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 3600, 360_061)] == ["0:00:00", "0:01:00", "1:00:00", "100:01:01"]


def results(count: int, seconds: float) -> Iterator[tuple[int, int, float]]:
    for number in range(count):
        time.sleep(seconds)
        yield number, 10, 3.0


def test_plain_lines_without_a_terminal() -> None:
    """Also while a long video is in hand: the lines come by the clock, not by videos."""
    text = io.StringIO()
    with BuildProgress(Console(file=text, width=40), every=0.1) as progress:
        assert list(progress.videos(results(2, 0.5), 2, 20)) == [0, 1]
        assert list(progress.track([7, 8], 2, "writing shards")) == [7, 8]
        progress.say("said")
    lines = text.getvalue().splitlines()
    assert 4 <= len(lines) <= 12 and lines[0] == "videos to samples: 0 of 2" and lines[-1] == "said"
    assert re.fullmatch(
        r"videos to samples: 1 of 2, \d+\.\d\d videos/s, \d+\.\d h of video per hour, 0:00:0\d left", lines[-2]
    )


def test_nothing_but_bars_on_a_terminal() -> None:
    text = io.StringIO()
    with BuildProgress(Console(file=text, force_terminal=True, width=120), every=0.05) as progress:
        assert list(progress.videos(results(2, 0.2), 2, 20)) == [0, 1]
    assert "videos to samples: " not in text.getvalue()
    assert "2/2" in text.getvalue() and "h of video per hour" in text.getvalue()
