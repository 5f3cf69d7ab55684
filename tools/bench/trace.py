"""What the GPU did in one step: how long it was busy, which kernels cost most, and where it had nothing to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROWS = 60
GAPS = 25


class Span(NamedTuple):
    """A kernel or copy; microseconds."""

    start: float
    end: float
    name: str


def traced(step: Callable[[], object], with_host: bool) -> tuple[Any, list[Span]]:
    """The profiler's record of one call, and what ran on the device in the order in which it began."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities if with_host else activities[:1]) as profiler:
        step()
        torch.cuda.synchronize()
    spans = [
        Span(event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    return profiler, sorted(spans)


def busy_ms(spans: list[Span]) -> float:
    """Milliseconds in which something ran."""
    total, reached = 0.0, 0.0
    for start, end, _ in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1000


def gaps(spans: list[Span]) -> list[tuple[float, float, str, str]]:
    """(length, start after the first kernel, what ran before, what ran after) of idle times; ms, the longest first."""
    found = []
    last = spans[0]
    for span in spans[1:]:
        if span.start > last.end:
            idle, begin = (span.start - last.end) / 1000, (last.end - spans[0].start) / 1000
            found.append((idle, begin, last.name, span.name))
        if span.end > last.end:
            last = span
    return sorted(found, reverse=True)


def write_tables(path: Path, profiler: Any, spans: list[Span]) -> None:
    """The costliest kernels, the costliest calls of the host, and the longest idle times."""
    averages = profiler.key_averages()
    parts = [averages.table(sort_by=f"self_{kind}_time_total", row_limit=ROWS, max_name_column_width=90)
             for kind in ("cuda", "cpu")]  # fmt: skip
    idle = gaps(spans)
    lines = [f"{ms:8.3f} ms idle at {at:8.2f} after {a[:70]} before {b[:70]}" for ms, at, a, b in idle[:GAPS]]
    lines.append(f"{sum(gap[0] for gap in idle):8.3f} ms idle in {len(idle)} gaps; {len(spans)} kernels and copies")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, *lines]) + "\n")
