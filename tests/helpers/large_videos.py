"""8K videos of a real face, and what workers of a build take for them: the functions run in those, by `run_tasks`."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from helpers.long_videos import peak

from dualforce.codecs.memory import give_back_memory
from dualforce.preprocess.models import Models
from dualforce.preprocess.work import Task, perform

SIZE = (7680, 4320)
HZ = 16_000
# As many reference pictures as the levels allow at this size: 5 of H.264 (A.3.1), 6 of HEVC (A.4.2).
CODECS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264": ("libx264", "yuv420p", {
        "preset": "ultrafast", "crf": "28", "bf": "3", "b-pyramid": "normal", "b_strategy": "0", "refs": "5",
        "x264-params": "level=6.2",
    }),
    "hevc": ("libx265", "yuv420p10le", {
        "preset": "ultrafast", "x265-params": "log-level=none:ref=5:bframes=4:b-pyramid=1",
    }),
}  # fmt: skip


def make_8k(source: Path, target: Path, codec: str, count: int = 86) -> None:
    """The first pictures of a square clip, scaled to the height of SIZE in the middle of grey, with its sound."""
    name, pix_fmt, options = CODECS[codec]
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        video = new.add_stream(name, rate=25, options=options)
        video.width, video.height, video.pix_fmt = *SIZE, pix_fmt
        audio = new.add_stream("aac", rate=HZ, layout="mono")
        for number, frame in enumerate(old.decode(video=0)):
            if number == count:
                break
            wide = _widened(frame).reformat(format=pix_fmt)
            wide.pts, wide.time_base = number, Fraction(1, 25)
            new.mux(video.encode(wide))
        new.mux(video.encode(None))
        with av.open(str(source)) as again:
            resampler = av.AudioResampler("fltp", "mono", HZ, frame_size=1024)
            for sound in again.decode(audio=0):
                if sound.time < count / 25 + 0.3:
                    new.mux([packet for part in resampler.resample(sound) for packet in audio.encode(part)])
        new.mux(audio.encode(None))


def _widened(frame: av.VideoFrame) -> av.VideoFrame:
    square = frame.reformat(width=SIZE[1], height=SIZE[1], format="yuv420p", interpolation="BICUBIC")
    wide = av.VideoFrame(*SIZE, "yuv420p")
    for target, source in zip(wide.planes, square.planes, strict=True):
        picture = np.full((target.height, target.line_size), 128, np.uint8)
        left = (target.width - source.width) // 2
        rows = np.frombuffer(source, np.uint8).reshape(source.height, source.line_size)
        picture[:, left : left + source.width] = rows[:, : source.width]
        target.update(picture.tobytes())
    return wide


def perform_measured(task: Task, models: Models) -> dict[str, Any]:
    """What became of a video, and the most MiB that the worker had resident."""
    result = perform(task, models)
    return {"samples": len(result.samples), "rejected": result.rejected, "peak": peak()}


def tear_the_heap(rounds: int, kept: object) -> float:
    """MiB by which the worker grew at most: blocks of 20 to 31 MiB of ever other sizes, of which four live at a time,
    with a small one that stays after each."""
    rng = np.random.default_rng(0)
    before, living, pins = peak(), [torch.zeros(1)] * 4, []
    for number in range(rounds):
        living[number % 4] = torch.zeros(int(rng.integers(20 * 2**18, 31 * 2**18)))
        pins += [bytearray(int(size)) for size in rng.integers(100, 2**21, 4)]
        del pins[:-8:2]
    return peak() - before


def fill_and_free(megabytes: int, kept: object) -> tuple[float, float]:
    """MiB that the worker still holds of small blocks that were freed below one that stays: before and after memory
    was given back."""
    empty = _held()
    blocks = [bytearray(2**16) for _ in range(16 * megabytes)]
    last = bytearray(2**16)
    del blocks
    freed = _held() - empty
    give_back_memory()
    return freed, _held() - empty + 0 * len(last)


def _held() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def nothing(device: str) -> None:
    """For workers that need no models."""
