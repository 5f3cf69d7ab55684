"""Long videos that cost little, and what it takes to preprocess one: `python -m helpers.long_videos VIDEO SCRATCH`.

The process runs every stage on VIDEO but the networks that look at faces: these are stand-ins (one still face, motion
of zeros), so that an hour takes a minute. It prints JSON: peak resident MiB before and after, seconds, samples.
"""

from __future__ import annotations

import json
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from numpy.typing import NDArray

from dualforce.preprocess.job import Job
from dualforce.preprocess.models import Models
from dualforce.preprocess.process import process_video
from dualforce.preprocess.quality import Limits
from dualforce.types import FPS

SIDE = 96
HZ = 16_000
LOOP = 60  # seconds of sound, repeated


def make_long(path: Path, seconds: int, rate: Fraction = Fraction(1, 2)) -> None:
    """Pictures of SIDE x SIDE pixels at `rate` that hardly change, and noise.

    Three quarters of a minute are cut off at full scale: most windows are refused before their pictures are cut out,
    which takes most of the time."""
    n = np.arange(HZ * LOOP)
    noise = np.random.default_rng(0).normal(0, 0.1, len(n)) * np.where(n < LOOP * HZ // 4, 1, 100)
    noise = noise.clip(-1, 1)
    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=25, options={"preset": "ultrafast", "g": "600"})
        video.width = video.height = SIDE
        video.pix_fmt, video.codec_context.time_base = "yuv420p", Fraction(1, 1000)
        audio = file.add_stream("pcm_s16le" if path.suffix == ".mkv" else "aac", rate=HZ, layout="mono")
        y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
        for number in range(int(seconds * rate)):
            grey = 127 + 80 * np.sin(7 * x + 5 * y + 0.05 * np.sin(number))
            frame = av.VideoFrame.from_ndarray(np.repeat(grey[..., None], 3, axis=2).astype(np.uint8), format="rgb24")
            frame.time_base, frame.pts = Fraction(1, 1000), round(1000 * number / rate)
            file.mux(video.encode(frame))
            first = int(number / rate * HZ)
            wave = noise[np.arange(first, first + int(HZ / rate)) % len(noise)].astype(np.float32)
            block = av.AudioFrame.from_ndarray(wave[None], "fltp", "mono")
            block.sample_rate, block.time_base, block.pts = HZ, Fraction(1, HZ), first
            file.mux(audio.encode(block))
        for stream in (video, audio):
            file.mux(stream.encode(None))


class StillFace(NamedTuple):
    box: NDArray[np.float64]


class StillFinder:
    tag, package, weights = "still-face-v1", "numpy", "0" * 64

    def faces(self, picture: NDArray[np.uint8]) -> list[StillFace]:
        return [StillFace(np.array([0.25, 0.25, 0.75, 0.75]) * picture.shape[0])]


class NoMotion:
    tag, names, width = "no-motion-v1", ("nothing",), 1

    def encode(self, pixels: NDArray[np.uint8], fps: float) -> torch.Tensor:
        return torch.zeros(len(pixels), 1)


class StandIns(Models):
    def faces(self, job: Job) -> StillFinder:  # type: ignore[override]
        return StillFinder()

    def motion(self, job: Job) -> NoMotion:
        return NoMotion()


def peak() -> float:
    """Most MiB that this process has had resident; unlike getrusage's, without those of who started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main(video: Path, scratch: Path) -> None:
    torch.set_num_threads(1)
    limits = Limits(face_share=0.1, speech_share=0.0, sharpness=0.0)
    job = Job(video, video.name, "key", "who", "", 0, 64, limits, None, None, scratch)
    before, begun = peak(), time.monotonic()
    outcome = process_video(job, StandIns())
    seconds = time.monotonic() - begun
    print(json.dumps({
        "before": round(before, 1), "peak": round(peak(), 1), "seconds": round(seconds, 1),
        "samples": len(outcome.samples), "rejected": outcome.rejected[:3], "frames_of_a_second": FPS,
    }))  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
