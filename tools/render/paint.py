"""Colour of the head's surface: eyes, brows, mouth, beard and glasses painted in head space, and the light on it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tools.render.geometry import Hits, jaw_drop
from tools.render.identity import Colour, Identity
from tools.render.motion import Pose
from tools.render.shape import Array

_MOUTH_Y = -0.47
_EDGE = 0.018  # width of painted edges, head units


class Painted(NamedTuple):
    """Colour of every hit, and which of them show the mouth."""

    colour: Array  # [3,n] sRGB in [0, 1], lit
    mouth: NDArray[np.bool_]  # [n] lips and what lies between them


def _inside(distance: Array) -> Array:
    """1 where `distance` < 0, falling to 0 within _EDGE."""
    return np.asarray(np.clip(0.5 - distance / _EDGE, 0.0, 1.0), dtype=np.float32)


def _lay(colour: Array, over: Colour, cover: Array) -> None:
    """Blend the colour `over` into `colour` [3,n] in place where `cover` [n] says."""
    for channel in range(3):
        colour[channel] += cover * (np.float32(over[channel]) - colour[channel])


def _darker(colour: Colour, factor: float) -> Colour:
    return (colour[0] * factor, colour[1] * factor, colour[2] * factor)


def _paint_eyes(colour: Array, p: Array, who: Identity, pose: Pose) -> None:
    """Almond eyes that look at the camera whatever the head does; the upper lid carries the blink."""
    size = who.eye_size
    half, high, low = 0.175 * size, 0.125 * size, 0.085 * size
    gaze_x, gaze_y = -0.0022 * pose.yaw, -0.0030 * pose.pitch
    for sign in (-1.0, 1.0):
        x, y = p[0] - np.float32(sign * (0.30 + who.eye_gap)), p[1] - np.float32(0.06)
        front = (np.abs(x) < 0.30) & (np.abs(y) < 0.26) & (p[2] > 0.25)
        x, y, spot = x[front], y[front], colour[:, front]
        bow = 1.0 - (x / half) ** 2
        upper = (high * (1.0 - pose.blink) - low * pose.blink) * bow
        lower = -low * bow
        crease = _inside(np.abs(y - high * 1.25 * bow - 0.02) - 0.010) * (bow > -0.2)
        _lay(spot, _darker(who.skin, 0.72), crease * np.float32(0.7))
        _lay(spot, _darker(who.skin, 0.90), _inside(np.maximum(y - high * bow, lower - y)))  # closed lid
        opened = _inside(np.maximum(y - upper, lower - y)) * (bow > 0)
        shade = np.clip(1.0 - 0.35 * np.exp(-(((upper - y) / 0.035) ** 2)), 0, 1)
        _lay(spot, (0.96, 0.96, 0.95), opened)
        off = np.hypot(x - gaze_x, y - gaze_y - 0.012)
        _lay(spot, _darker(who.iris, 0.55), opened * _inside(off - 0.088 * size))
        _lay(spot, who.iris, opened * _inside(off - 0.072 * size))
        _lay(spot, (0.04, 0.03, 0.04), opened * _inside(off - 0.038 * size))
        spot *= 1.0 - opened * (1.0 - shade)
        _lay(spot, (1.0, 1.0, 1.0), opened * _inside(np.hypot(x - gaze_x - 0.03, y - gaze_y - 0.045) - 0.019))
        _lay(spot, (0.10, 0.07, 0.07), _inside(np.abs(y - upper) - 0.016) * (bow > 0.0))
        colour[:, front] = spot


def _paint_brows(colour: Array, p: Array, who: Identity, pose: Pose) -> None:
    hair = (0.30, 0.22, 0.17) if who.hair_style in ("bald", "cap") else _darker(who.hair, 0.75)
    side = np.abs(p[0]) - np.float32(0.31 + who.eye_gap)
    arc = 0.285 + 0.07 * pose.brow_raise - 0.9 * side * side + 0.05 * side
    thick = 0.036 * np.clip(1.15 - 2.6 * np.maximum(side, 0.0), 0.4, 1.0)
    cover = _inside(np.maximum(np.abs(p[1] - arc) - thick, np.abs(side) - 0.19)) * (p[2] > 0.2)
    _lay(colour, hair, cover * np.float32(0.9))


def _paint_beard(colour: Array, p: Array, who: Identity, drop: float) -> None:
    """Beard and moustache as a soft mask below the cheeks, free around the lips' upper middle."""
    x, y = p[0], p[1]
    line = -0.36 + 0.45 * np.abs(x) ** 1.5  # upper edge rises towards the ears
    cover = np.clip((line - y) / 0.08, 0.0, 1.0) * (p[2] > -0.12) * (y < 0.1)
    under_nose = np.hypot(x / 0.10, (y + 0.33) / 0.05) < 1.0
    cover = cover * np.where(under_nose, 0.5, 1.0) * np.float32(who.beard)
    hair = (0.26, 0.19, 0.15) if who.hair_style in ("bald", "cap") else _darker(who.hair, 0.8)
    _lay(colour, hair, cover.astype(np.float32))


def _paint_mouth(colour: Array, p: Array, who: Identity, pose: Pose) -> NDArray[np.bool_]:
    """Lips, dark inside, upper teeth and tongue; the gap between the lips is proportional to `mouth_open`."""
    gap = 0.26 * pose.mouth_open
    half = 0.25 * who.mouth_width * (1.0 + 0.20 * pose.mouth_wide) * (1.0 - 0.10 * pose.mouth_open)
    shown = np.zeros(p.shape[1], dtype=np.bool_)
    front = (np.abs(p[0]) < 0.42) & (p[1] < -0.30) & (p[1] > -0.95) & (p[2] > 0.2)
    x, spot = p[0, front], colour[:, front]
    y = p[1, front] - np.float32(_MOUTH_Y) - 0.45 * x * x  # corners a little up: a friendly face
    bow = np.clip(1.0 - (x / half) ** 2, 0.0, 1.0)
    wide = np.sqrt(bow)
    top, bottom = 0.03 * pose.mouth_open * wide, -gap * wide
    cupid = 0.012 * np.cos(np.clip(x / 0.06, -np.pi, np.pi))
    lips = np.maximum(y - top - (0.062 - cupid) * bow - 0.004, bottom - 0.085 * bow - 0.004 - y)
    inner = np.maximum(y - top, bottom - y)
    within = np.abs(x) < half
    cover = _inside(lips) * within
    _lay(spot, who.lips, cover)
    _lay(spot, _darker(who.lips, 0.8), cover * (y > top))  # the upper lip is in shade
    hole = _inside(inner) * within
    _lay(spot, (0.20, 0.05, 0.06), hole)
    tongue = np.hypot(x / 0.15, (y + gap + 0.01) / (0.09 + 1e-3)) - 1.0
    _lay(spot, (0.70, 0.30, 0.32), hole * _inside(0.1 * tongue) * np.float32(min(1.0, 3 * pose.mouth_open)))
    teeth = np.maximum(top - 0.065 - y, np.abs(x) - 0.80 * half)
    _lay(spot, (0.95, 0.94, 0.90), hole * _inside(teeth) * np.float32(np.clip(5 * pose.mouth_open - 0.8, 0, 1)))
    _lay(spot, (0.25, 0.08, 0.08), _inside(np.abs(y - 0.5 * (top + bottom)) - 0.011) * within * (gap < 0.04))
    colour[:, front] = spot
    shown[front] = cover > 0.5
    return shown


def _paint_glasses(colour: Array, p: Array, who: Identity) -> None:
    side = np.abs(p[0]) - np.float32(0.31 + who.eye_gap)
    ring = np.abs((np.abs(side / 0.24) ** 3 + np.abs((p[1] - 0.05) / 0.20) ** 3) ** (1.0 / 3.0) - 1.0) * 0.22 - 0.02
    bridge = np.maximum(np.abs(p[0]) - 0.09, np.abs(p[1] - 0.10) - 0.018)
    arm = np.maximum(np.abs(p[1] - 0.10) - 0.022, 0.52 - np.abs(p[0]))
    cover = _inside(np.minimum(np.minimum(ring, bridge), arm)) * (p[2] > -0.05)
    _lay(colour, (0.12, 0.11, 0.13), cover)


def _albedo(hits: Hits, who: Identity, pose: Pose) -> tuple[Array, NDArray[np.bool_]]:
    p = hits.point
    skin = np.empty_like(p)
    skin[:] = np.array(who.skin, dtype=np.float32)[:, None]
    blush = np.exp(-(((np.abs(p[0]) - 0.40) / 0.17) ** 2) - ((p[1] + 0.22) / 0.13) ** 2) * (p[2] > 0)
    _lay(skin, (0.92, 0.40, 0.38), np.float32(0.20) * blush)
    if who.beard > 0:
        _paint_beard(skin, p, who, jaw_drop(pose))
    mouth = _paint_mouth(skin, p, who, pose) & ~hits.hair
    nostril = _inside(np.hypot((np.abs(p[0]) - 0.06) / 1.4, p[1] + 0.275) - 0.020) * (p[2] > 0.5)
    _lay(skin, _darker(who.skin, 0.40), nostril)
    _paint_eyes(skin, p, who, pose)
    _paint_brows(skin, p, who, pose)
    if who.glasses:
        _paint_glasses(skin, p, who)
    tone = np.array(who.trim if who.hair_style == "cap" else who.hair, dtype=np.float32)[:, None]
    band = (hits.point[1] + 0.18 * hits.point[2] < 0.50) & (who.hair_style == "cap")
    strands = 1.0 + 0.07 * np.sin(14.0 * np.arctan2(p[0], p[2] + 1.2) + 3.0 * p[1])
    over = tone * strands * np.where(band, 0.78, 1.0)
    return np.where(hits.hair, over, skin).astype(np.float32), mouth


def light(colour: Array, normal: Array, who: Identity, gloss: float) -> Array:
    """Lambert's law with a warm key light, a cool fill and a soft highlight; [3,n] and [3,n] -> [3,n]."""
    key = np.array(who.light, dtype=np.float32)
    lit = np.clip(key @ normal * 0.85 + 0.15, 0.0, None)  # wrapped a little: skin scatters
    fill = 0.5 + 0.5 * normal[1]
    halfway = key + np.array([0, 0, 1], dtype=np.float32)
    shine = gloss * np.clip((halfway / np.linalg.norm(halfway)) @ normal, 0.0, None) ** 24
    edge = 0.72 + 0.28 * np.clip(normal[2], 0.0, 1.0)
    out = colour * (0.36 + 0.62 * lit + 0.14 * fill) * edge + shine
    return np.asarray(np.clip(out, 0.0, 1.0), dtype=np.float32)


def paint(hits: Hits, who: Identity, pose: Pose) -> Painted:
    """Lit colour of every hit."""
    colour, mouth = _albedo(hits, who, pose)
    return Painted(light(colour, hits.normal, who, 0.10), mouth)
