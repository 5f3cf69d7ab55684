"""The head as a smooth union of ellipsoids, evaluated as signed distances.

Head space: x to the right side of the picture, y up, z towards the camera; the bare head reaches from about y = -1
(chin) to y = 1. Distances of ellipsoids are the first-order estimate k0 (k0 - 1) / k1 with k0 = |p / r| and
k1 = |p / r^2| (I. Quilez, "distance functions"). Both squares are linear in (x^2, y^2, z^2, x, |x|, y, z, 1), so one
small matrix product evaluates all ellipsoids at all points.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tools.render.identity import Identity

Array = NDArray[np.float32]
Vector = tuple[float, float, float]

_FAR = 9.0
_BLOCK = 4096  # points evaluated together: what they need stays in the processor's cache


class Blob(NamedTuple):
    """An ellipsoid; `fillet` is the size of the rounding where it meets the blobs before it."""

    centre: Vector
    radius: Vector
    fillet: float = 0.0
    mirrored: bool = False  # twice, left and right
    carve: bool = False  # taken away instead of added


class Shape(NamedTuple):
    """A head with its jaw at one opening, ready to be evaluated."""

    weights: Array  # [2K,8]: k0^2 of every blob, then k1^2 of every blob
    skin: tuple[Blob, ...]
    hair: tuple[Blob, ...]
    floor: tuple[float, float] | None  # hair exists only where y + slope z > height; (slope, height)


def _skin(who: Identity, drop: float) -> tuple[Blob, ...]:
    w, jaw, n = who.head_width, who.jaw_width, who.nose
    return (
        Blob((0, 0.24, -0.06), (0.74 * w, 0.76, 0.82)),  # skull
        Blob((0, -0.34 - 0.5 * drop, 0.12), (0.55 * w * jaw, 0.64 + 0.5 * drop, 0.60), 0.22),  # jaw
        Blob((0, -0.86 - who.chin - drop, 0.42), (0.20 * jaw, 0.13, 0.18), 0.22),  # chin
        Blob((0.36 * w, -0.20, 0.42), (0.20, 0.22, 0.24), 0.20, mirrored=True),  # cheeks
        Blob((0.30 + who.eye_gap, 0.08, 0.92), (0.20, 0.15, 0.20), 0.14, mirrored=True, carve=True),  # eye sockets
        Blob((0, -0.02, 0.76), (0.08, 0.26, 0.12), 0.14),  # bridge of the nose
        Blob((0.02, -0.21, 0.88), (0.11 * n, 0.10 * n, 0.13 * n), 0.08, mirrored=True),  # tip and wings
        Blob((0, -0.50 - 0.5 * drop, 0.68), (0.22, 0.12 + 0.5 * drop, 0.08), 0.10),  # lips
        Blob((0.75 * w, -0.02, -0.05), (0.09, 0.20, 0.13), 0.04, mirrored=True),  # ears
    )


def _hair(who: Identity) -> tuple[tuple[Blob, ...], tuple[float, float] | None]:
    """Blobs of hair or hat, and where they end below."""
    w = who.head_width
    cap = Blob((0, 0.30, -0.10), (0.82 * w, 0.80, 0.88))
    face = Blob((0, -0.28, 0.95), (0.66 * w, 0.84, 0.85), 0.05, carve=True)
    match who.hair_style:
        case "bald":
            return (), None
        case "cap":
            return (Blob((0, 0.34, -0.08), (0.83 * w, 0.80, 0.91)),), (0.18, 0.36)
        case "long":
            return (cap, Blob((0, -0.45, -0.32), (0.86 * w, 0.92, 0.42), 0.3), face), None
        case "bob":
            return (cap, Blob((0.58 * w, -0.28, -0.10), (0.30, 0.52, 0.50), 0.2, mirrored=True), face), None
        case "quiff":
            return (cap, Blob((0.12, 0.98, 0.30), (0.50, 0.22, 0.42), 0.2), face), (0.0, -0.15)
        case "short":
            return (cap, face), (0.0, -0.15)
    raise ValueError(f"hair_style {who.hair_style!r}: expected one of identity.HAIR_STYLES")


def _row(blob: Blob, power: int) -> list[float]:
    """Weights of sum_i (p_i - c_i)^2 / r_i^power over (x^2, y^2, z^2, x, |x|, y, z, 1)."""
    w = [1.0 / r**power for r in blob.radius]
    linear = [-2.0 * wi * ci for wi, ci in zip(w, blob.centre, strict=True)]
    x, side = (0.0, linear[0]) if blob.mirrored else (linear[0], 0.0)
    rest = sum(wi * ci * ci for wi, ci in zip(w, blob.centre, strict=True))
    return [*w, x, side, linear[1], linear[2], rest]


def make_shape(who: Identity, drop: float) -> Shape:
    """The head of `who` with the jaw sunk by `drop` head units."""
    skin = _skin(who, drop)
    hair, floor = _hair(who)
    blobs = (*skin, *hair)
    rows = [_row(blob, 2) for blob in blobs] + [_row(blob, 4) for blob in blobs]
    return Shape(np.array(rows, dtype=np.float32), skin, hair, floor)


def _fold(blobs: tuple[Blob, ...], distance: Array) -> Array:
    """Join and carve the blobs' distances [K,n] in order; changes `distance`."""
    total = distance[0]
    for blob, d in zip(blobs[1:], distance[1:], strict=True):
        sign = np.float32(-1.0 if blob.carve else 1.0)
        if blob.carve:
            np.negative(d, out=d)
        blend = np.abs(total - d)
        np.subtract(np.float32(blob.fillet), blend, out=blend)
        np.maximum(blend, np.float32(0.0), out=blend)
        blend *= blend
        blend *= sign * np.float32(0.25 / blob.fillet)
        total = np.maximum(total, d) if blob.carve else np.minimum(total, d)
        total -= blend
    return total


def _distances(shape: Shape, p: Array) -> tuple[Array, Array]:
    features = np.concatenate([p * p, p[:1], np.abs(p[:1]), p[1:], np.ones_like(p[:1])])
    squares = shape.weights @ features
    np.maximum(squares, np.float32(1e-12), out=squares)
    estimate, k1 = np.split(squares, 2)
    estimate -= np.sqrt(estimate)
    estimate /= np.sqrt(k1, out=k1)
    skin = _fold(shape.skin, estimate[: len(shape.skin)])
    if not shape.hair:
        return skin, np.full_like(skin, _FAR)
    hair = _fold(shape.hair, estimate[len(shape.skin) :])
    if shape.floor is not None:
        slope, height = (np.float32(value) for value in shape.floor)
        hair = np.maximum(hair, height - p[1] - slope * p[2])
    return skin, hair


def distances(shape: Shape, p: Array) -> tuple[Array, Array]:
    """Signed distances of the points [3,n] to skin and to hair, each [n]; positive is outside."""
    out = np.empty((2, p.shape[1]), dtype=np.float32)
    for first in range(0, p.shape[1], _BLOCK):
        part = slice(first, first + _BLOCK)
        out[0, part], out[1, part] = _distances(shape, p[:, part])
    return out[0], out[1]
