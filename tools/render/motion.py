"""How a rendered head moves: one row of named values per pixel frame, which together with the identity is the picture.

| name | unit | meaning |
|---|---|---|
| pitch | degrees | positive looks up |
| yaw | degrees | positive turns the nose to the right side of the picture |
| roll | degrees | positive tilts the crown to the left side of the picture |
| tx, ty | half pictures | shift of the person; positive is right, up |
| scale | 1 | size of the person |
| mouth_open | 0..1 | the envelope of the sound |
| mouth_wide | -1..1 | rounded to spread lips |
| blink | 0..1 | lids open to closed |
| brow_raise | 0..1 | brows at rest to raised |
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dualforce.types import FPS
from tools.render.sound import Speech

Floats = NDArray[np.float64]

MOTION_TAG = "rendered-head-v1"


class Pose(NamedTuple):
    """Motion of one pixel frame; the field names are the names in the sidecar."""

    pitch: float
    yaw: float
    roll: float
    tx: float
    ty: float
    scale: float
    mouth_open: float
    mouth_wide: float
    blink: float
    brow_raise: float


# Range of each head movement: the track stays within plus and minus this.
_REACH = {"pitch": 8.0, "yaw": 20.0, "roll": 6.0, "tx": 0.05, "ty": 0.035, "scale": 0.04}


def _wander(rng: np.random.Generator, time: Floats, reach: float) -> Floats:
    """Smooth random movement within [-reach, reach]: three slow sines of random frequency and phase."""
    rate = rng.uniform((0.10, 0.22, 0.45), (0.22, 0.45, 0.8))
    phase = rng.uniform(0, 2 * np.pi, 3)
    weight = np.array([0.55, 0.30, 0.15]) * rng.uniform(0.7, 1.0, 3)
    return reach * (np.sin(2 * np.pi * time[:, None] * rate + phase) @ weight)


def _blinks(rng: np.random.Generator, time: Floats) -> Floats:
    """Lids close and open within 0.24 s, every 1.5 to 3.5 s."""
    out = np.zeros_like(time)
    at = float(rng.uniform(0.4, 2.2))
    while at < time[-1] + 0.2:
        out = np.maximum(out, np.clip(1.3 * (1.0 - np.abs(time - at) / 0.12), 0.0, 1.0))
        at += float(rng.uniform(1.5, 3.5))
    return out


def frame_times(frames: int) -> Floats:
    """Middle of each pixel frame in seconds, [frames]: the instant at which the picture is taken."""
    return (np.arange(frames) + 0.5) / FPS


def make_motion(rng: np.random.Generator, speech: Speech, frames: int) -> list[Pose]:
    """Motion of every pixel frame, rounded to 4 decimals: what is drawn is exactly what the sidecar says."""
    time = frame_times(frames)
    track = {name: _wander(rng, time, reach) for name, reach in _REACH.items()}
    track["scale"] = 1.0 + track["scale"]
    opening = speech.envelope(time)
    values = {
        **track,
        "mouth_open": opening,
        "mouth_wide": speech.spread(time),
        "blink": _blinks(rng, time),
        "brow_raise": np.clip(0.5 + _wander(rng, time, 0.7), 0.0, 1.0),
    }
    table = np.round(np.stack([values[name] for name in Pose._fields], axis=1), 4)
    return [Pose(*map(float, row)) for row in table]
