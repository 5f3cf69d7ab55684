"""Histograms, as numbers and as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 24
WIDTH, HEIGHT = 360, 120  # of the bars, in SVG units


@dataclass(frozen=True)
class Histogram:
    """Counts [n] of values between edges [n + 1], with least, middle and greatest value."""

    title: str
    count: int
    least: float
    median: float
    most: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def bars(self) -> list[tuple[float, float, float, float, str]]:
        """(x, y, width, height, words) of every bar, in a picture of WIDTH x HEIGHT."""
        step, top = WIDTH / len(self.counts), max(self.counts)
        return [
            (round(i * step, 2), round(HEIGHT * (1 - n / top), 2), round(step * 0.92, 2), round(HEIGHT * n / top, 2),
             f"{self.edges[i]:.4g} to {self.edges[i + 1]:.4g}: {n}")
            for i, n in enumerate(self.counts)
        ]  # fmt: skip


def histogram(title: str, values: Sequence[float]) -> Histogram:
    """Histogram of one or more finite values; equal ones share a single bin. Raises ValueError for none."""
    data = np.asarray(values, np.float64)
    if not data.size or not np.isfinite(data).all():
        raise ValueError(f"{title}: {data.size} values: expected finite ones, at least one")
    counts, edges = np.histogram(data, bins=BINS if float(np.ptp(data)) > 0 else 1)
    return Histogram(
        title, int(data.size), float(data.min()), float(np.median(data)), float(data.max()),
        tuple(float(edge) for edge in edges), tuple(int(count) for count in counts),
    )  # fmt: skip
