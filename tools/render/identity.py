"""Who is rendered: every look and voice parameter of one invented person, a pure function of (seed, index).

Colours come from low-discrepancy sequences over the index, so that the people of one set are spread widely however
many there are: a model cannot learn a few faces by heart, it must copy the look from the reference image.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

Colour = tuple[float, float, float]

# Ratios whose multiples modulo 1 fill the unit interval evenly (powers of the inverse plastic number and golden ratio).
_GOLDEN = 0.6180339887
_PLASTIC = 0.7548776662
_PLASTIC2 = 0.5698402910

_SKIN: tuple[Colour, ...] = (
    (0.98, 0.86, 0.76), (0.95, 0.78, 0.65), (0.90, 0.70, 0.54), (0.82, 0.60, 0.43),
    (0.70, 0.48, 0.33), (0.56, 0.37, 0.25), (0.43, 0.28, 0.19), (0.34, 0.22, 0.16),
)  # fmt: skip
_HAIR: tuple[Colour, ...] = (
    (0.10, 0.08, 0.08), (0.88, 0.72, 0.40), (0.36, 0.20, 0.11), (0.70, 0.28, 0.10), (0.74, 0.74, 0.76),
    (0.22, 0.13, 0.08), (0.20, 0.34, 0.62), (0.56, 0.38, 0.20), (0.80, 0.36, 0.55), (0.93, 0.91, 0.86),
)  # fmt: skip
_IRIS: tuple[Colour, ...] = (
    (0.32, 0.19, 0.09), (0.22, 0.45, 0.70), (0.25, 0.50, 0.28), (0.45, 0.32, 0.14), (0.42, 0.47, 0.52),
)  # fmt: skip
HAIR_STYLES = ("short", "long", "cap", "bald", "bob", "quiff")


@dataclass(frozen=True)
class Identity:
    """Look and voice of one person; colours are sRGB in [0, 1], lengths in head units (half a head height is 1)."""

    name: str
    skin: Colour
    hair: Colour
    iris: Colour
    lips: Colour
    clothes: Colour
    trim: Colour
    background: tuple[Colour, Colour]  # top and bottom of the vertical gradient
    hair_style: str  # one of HAIR_STYLES
    beard: float  # 0 none .. 1 full
    glasses: bool
    head_width: float
    jaw_width: float
    chin: float
    nose: float
    eye_size: float
    eye_gap: float
    mouth_width: float
    shoulders: float
    light: tuple[float, float, float]  # unit vector towards the key light
    pitch_hz: float  # fundamental of the voice
    tract: float  # factor on formant frequencies: > 1 is a shorter vocal tract


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    return (a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1]), a[2] + share * (b[2] - a[2]))


def _ramp(palette: tuple[Colour, ...], at: float) -> Colour:
    position = at * (len(palette) - 1)
    low = min(int(position), len(palette) - 2)
    return _mix(palette[low], palette[low + 1], position - low)


def _hsv(hue: float, saturation: float, value: float) -> Colour:
    return colorsys.hsv_to_rgb(hue % 1.0, saturation, value)


def _unit(x: float, y: float, z: float) -> tuple[float, float, float]:
    norm = float(np.sqrt(x * x + y * y + z * z))
    return (x / norm, y / norm, z / norm)


def make_identity(seed: int, index: int) -> Identity:
    """Person `index` of the set `seed`; independent of how many people the set has."""
    rng = np.random.default_rng([seed, index, 0])
    start = np.random.default_rng([seed, 0, 1]).random(4)  # where the spread sequences of this set begin
    hue = float(start[0] + index * _GOLDEN)
    tone = float(start[1] + index * _PLASTIC) % 1.0
    voice = float(start[2] + index * _PLASTIC2) % 1.0
    skin = _ramp(_SKIN, tone)
    style = HAIR_STYLES[(index + int(start[3] * 6)) % len(HAIR_STYLES)]
    bearded = voice < 0.5 and style not in ("long", "bob") and bool(rng.random() < 0.6)
    top = _hsv(hue, rng.uniform(0.2, 0.6), rng.uniform(0.45, 0.95))
    vary = rng.uniform(-1.0, 1.0, 10)
    return Identity(
        name=f"id{index:02d}" if seed == 0 else f"s{seed}-id{index:02d}",
        skin=skin,
        hair=_HAIR[(3 * index + int(start[3] * 10)) % len(_HAIR)],
        iris=_IRIS[(2 * index + int(start[2] * 5)) % len(_IRIS)],
        lips=_mix(_mix(skin, (0.80, 0.25, 0.28), 0.55), (0.45, 0.12, 0.16), 0.35 * float(rng.random()) + 0.1),
        clothes=_hsv(hue + 0.33 + 0.1 * vary[0], rng.uniform(0.3, 0.8), rng.uniform(0.25, 0.9)),
        trim=_hsv(hue + 0.66 + 0.1 * vary[1], rng.uniform(0.0, 0.6), rng.uniform(0.5, 1.0)),
        background=(top, _mix(top, _hsv(hue + 0.08, 0.5, 0.35), 0.35)),
        hair_style=style,
        beard=float(rng.uniform(0.75, 0.95)) if bearded else 0.0,
        glasses=bool(rng.random() < 0.25),
        head_width=1.0 + 0.08 * vary[2],
        jaw_width=1.0 + 0.14 * vary[3],
        chin=0.07 * vary[4],
        nose=1.0 + 0.22 * vary[5],
        eye_size=1.0 + 0.14 * vary[6],
        eye_gap=0.02 * vary[7],
        mouth_width=1.0 + 0.14 * vary[8],
        shoulders=1.0 + 0.12 * vary[9],
        light=_unit(float(rng.uniform(-0.7, 0.7)), float(rng.uniform(0.3, 0.7)), 1.0),
        pitch_hz=90.0 * 2.8**voice,
        tract=0.92 + 0.3 * voice,
    )
