"""One picture: background, shoulders and head, with what is seen measured on the same samples."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tools.render.geometry import HEAD_LIFT, HEAD_SCALE, REACH, Hits, cast
from tools.render.identity import Colour, Identity
from tools.render.motion import Pose
from tools.render.paint import light, paint
from tools.render.shape import Array

Box = tuple[float, float, float, float]

_UNSEEN = "nothing of the face or the mouth lies inside the picture: expected a larger size or a smaller movement"
_SAMPLES = 2  # per pixel and direction
_NECK = 0.40  # radius, head units
_NECK_TOP, _NECK_FOOT = -0.35, -1.60
_TORSO_Y = -2.42
_TORSO = (1.40, 1.24, 0.70)
_FOREHEAD = 0.55  # where the face ends above, head units
_EARS_Z = 0.10  # and at the sides
_SPINE_Z = -0.15  # the body's axis lies this far behind the head's centre


class Picture(NamedTuple):
    """A frame and its truth; boxes are (x0, y0, x1, y1) in pixels, edges included, y down."""

    pixels: NDArray[np.uint8]  # [S,S,3]
    face_box: Box  # visible skin from chin to forehead, without the ears
    mouth_box: Box  # lips and what lies between them


def _axes(size: int) -> tuple[Array, Array]:
    """Sample positions in half pictures: x [N] to the right and y [N] up."""
    n = size * _SAMPLES
    at = ((np.arange(n, dtype=np.float32) + 0.5) * (2.0 / n) - 1.0).astype(np.float32)
    return at, -at


def draw_background(who: Identity, size: int) -> Array:
    """Vertical gradient with a faint glow behind the head, [3,N,N] in [0, 1]."""
    x, y = _axes(size)
    share = (0.5 - 0.5 * y)[:, None]
    glow = 0.06 * np.exp(-(x[None, :] ** 2 + (y[:, None] - 0.1) ** 2) / 0.5)
    top, bottom = (np.array(c, dtype=np.float32)[:, None, None] for c in who.background)
    return np.asarray(np.clip(top + share * (bottom - top) + glow, 0.0, 1.0), dtype=np.float32)


def _dome(u: Array, v: Array, radius: tuple[float, float, float]) -> tuple[NDArray[np.bool_], Array]:
    """An ellipsoid around 0 seen from the front: cover [n] and normal [3,n]."""
    a, b = u / radius[0], v / radius[1]
    c2 = 1.0 - a * a - b * b
    normal = np.stack([a / radius[0], b / radius[1], np.sqrt(np.maximum(c2, 0.0)) / radius[2]])
    return c2 > 0, (normal / (np.linalg.norm(normal, axis=0) + 1e-9)).astype(np.float32)


def _neck_shade(v: Array) -> Array:
    """The head's shadow on neck and chest."""
    return np.clip(0.60 + 0.9 * (-0.95 - v), 0.60, 1.0).astype(np.float32)


def _draw_neck(canvas: Array, who: Identity, u: Array, v: Array) -> None:
    rows, columns = np.flatnonzero((v < _NECK_TOP) & (v > _NECK_FOOT)), np.flatnonzero(np.abs(u) < _NECK)
    if rows.size == 0 or columns.size == 0:
        return
    normal = _dome(u[columns], np.zeros_like(u[columns]), (_NECK, 1.0, _NECK))[1]
    skin = light(_column(who.skin), normal, who, 0.0)
    view = canvas[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    view[:] = skin[:, None, :] * _neck_shade(v[rows])[:, None]


def _draw_torso(canvas: Array, who: Identity, u: Array, v: Array) -> None:
    rows = np.flatnonzero(v < _TORSO_Y + _TORSO[1])
    if rows.size == 0:
        return
    gu, gv = (grid.ravel() for grid in np.meshgrid(u, v[rows]))
    cover, normal = _dome(gu, gv - np.float32(_TORSO_Y), (_TORSO[0] * who.shoulders, *_TORSO[1:]))
    at = np.flatnonzero(cover)
    gu, gv, normal = gu[at], gv[at], normal[:, at]
    neckline = np.hypot(gu / 0.50, (gv + 1.16) / 0.34)
    colour = np.where(np.abs(neckline - 1.08) < 0.10, _column(who.trim), _column(who.clothes))
    colour = np.where(neckline < 1.0, _column(who.skin) * _neck_shade(gv), colour)
    canvas[:, rows[0] + at // u.size, at % u.size] = light(colour, normal, who, 0.0)


def _column(colour: Colour) -> Array:
    return np.array(colour, dtype=np.float32)[:, None]


def _before_body(hits: Hits, u: Array, v: Array, who: Identity) -> NDArray[np.bool_]:
    """Which hits lie before neck and shoulders; u, v [n] in head units."""
    width, height, thick = _TORSO
    neck = np.where(v < _NECK_TOP, np.sqrt(np.maximum(_NECK**2 - u * u, 0.0)), 0.0)
    torso = thick * np.sqrt(np.maximum(1.0 - (u / (width * who.shoulders)) ** 2 - ((v - _TORSO_Y) / height) ** 2, 0.0))
    body = np.maximum(neck, torso)
    return np.asarray((body == 0.0) | (hits.depth > body + _SPINE_Z))


def _box(shown: NDArray[np.bool_]) -> Box:
    """Bounding box of the samples, in pixels; raises ValueError when nothing is shown."""
    rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    if rows.size == 0:
        raise ValueError(_UNSEEN)
    corners = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    x0, y0, x1, y1 = (float(corner) / _SAMPLES for corner in corners)
    return (x0, y0, x1, y1)


def draw(who: Identity, pose: Pose, background: Array) -> Picture:
    """The picture of `who` in `pose` before `background` (from `draw_background`).

    Raises ValueError when the face or the mouth lies outside the picture: then there is no truth to tell.
    """
    n = background.shape[1]
    size = n // _SAMPLES
    x, y = _axes(size)
    canvas = background.copy()
    unit = HEAD_SCALE * pose.scale
    u, v = (x - pose.tx) / unit, (y - pose.ty - HEAD_LIFT) / unit
    _draw_neck(canvas, who, u, v)
    _draw_torso(canvas, who, u, v)
    rows, columns = np.flatnonzero(np.abs(v) < REACH), np.flatnonzero(np.abs(u) < REACH)
    if min(rows.size, columns.size) < 2:
        raise ValueError(_UNSEEN)
    u, v = u[columns], v[rows]
    hits = cast(u, v, who, pose)
    painted = paint(hits, who, pose)
    seen = _before_body(hits, u[hits.column], v[hits.row], who)
    at = (rows[hits.row], columns[hits.column])
    canvas[:, at[0][seen], at[1][seen]] = painted.colour[:, seen]
    face, mouth = np.zeros((n, n), dtype=np.bool_), np.zeros((n, n), dtype=np.bool_)
    face[at] = seen & ~hits.hair & (hits.point[1] < _FOREHEAD) & (hits.point[2] > _EARS_Z)
    mouth[at] = painted.mouth & seen
    total = sum(canvas[:, i::_SAMPLES, j::_SAMPLES] for i in range(_SAMPLES) for j in range(_SAMPLES))
    pixels = np.round(total * np.float32(255.0 / _SAMPLES**2)).astype(np.uint8).transpose(1, 2, 0)
    return Picture(np.ascontiguousarray(pixels), _box(face), _box(mouth))
