"""A soft bar that moves to the right, in fields: pictures and frames that say which field comes first."""

from __future__ import annotations

from fractions import Fraction

import av
import av.filter
import numpy as np

WIDTH, HEIGHT, BAR, STEP = 192, 96, 24, 2  # pixels; the bar moves by STEP in a field
WHOLE = {"qp": "0", "preset": "ultrafast"}  # options of libx264
OPTIONS = WHOLE | {"flags": "+ildct+ilme"}


def bar(field: int) -> np.ndarray:
    """[HEIGHT,WIDTH,3] uint8: a soft bar that moves to the right, at time `field` / 50 s."""
    x = np.arange(WIDTH) - 20 - STEP * field
    row = 40 + 180 * np.clip(np.minimum(x, BAR - x) / 6, 0, 1)
    return np.broadcast_to(row[None, :, None], (HEIGHT, WIDTH, 3)).astype(np.uint8)


def woven(number: int, top_first: bool = True) -> np.ndarray:
    """Both fields of picture `number`, line by line."""
    picture = bar(2 * number).copy()
    picture[int(top_first) :: 2] = bar(2 * number + 1)[int(top_first) :: 2]
    return picture


def frame_of(picture: np.ndarray, field: str = "prog") -> av.VideoFrame:
    """A frame that says what it is: `tff`, `bff` (which field comes first) or `prog`."""
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(format="yuv420p")
    frame.time_base = Fraction(1, 25)
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base
    )  # fmt: skip
    graph.link_nodes(source, graph.add("setfield", f"mode={field}"), graph.add("buffersink")).configure()
    graph.push(frame)
    done = graph.pull()
    assert isinstance(done, av.VideoFrame)
    return done


def combing(picture: np.ndarray) -> float:
    """How far lines lie off the mean of the lines above and below, in codes: 0 without fields or edges."""
    grey = picture.astype(np.float64).mean(axis=2)
    return float(np.abs(grey[1:-1] - (grey[:-2] + grey[2:]) / 2).mean())
