"""Rays that find the head: parallel projection, sphere tracing on the signed distance of `shape`."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tools.render.identity import Identity
from tools.render.motion import Pose
from tools.render.shape import Array, Shape, distances, make_shape

HEAD_SCALE = 0.56  # head units to half pictures at scale 1
HEAD_LIFT = 0.12  # the head's centre at rest lies this far above the picture's centre, half pictures
REACH = 1.45  # no part of the head lies farther than this from its centre
_FRONT = 1.12  # nor farther than this towards the camera
_STEPS = 24  # of a fine ray
_COARSE_STEPS = 48
_NEAR = 0.004  # a ray this close has arrived; the last steps accept more, for rays that graze an edge
_TILE = 4  # rays per direction that share one coarse ray


class Hits(NamedTuple):
    """Where rays met the head; n of them did."""

    row: NDArray[np.int64]  # [n] index into v
    column: NDArray[np.int64]  # [n] index into u
    point: Array  # [3,n] head space
    depth: Array  # [n] towards the camera from the head's centre, head units
    normal: Array  # [3,n] picture space, unit length
    hair: NDArray[np.bool_]  # [n] hair or hat instead of skin


def rotation(pose: Pose) -> Array:
    """Head space to picture space, [3,3] = roll * yaw * pitch."""
    p, y, r = (math.radians(angle) for angle in (-pose.pitch, pose.yaw, pose.roll))
    about_x = np.array([[1, 0, 0], [0, math.cos(p), -math.sin(p)], [0, math.sin(p), math.cos(p)]])
    about_y = np.array([[math.cos(y), 0, math.sin(y)], [0, 1, 0], [-math.sin(y), 0, math.cos(y)]])
    about_z = np.array([[math.cos(r), -math.sin(r), 0], [math.sin(r), math.cos(r), 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x, dtype=np.float32)


def jaw_drop(pose: Pose) -> float:
    """How far the chin sinks when the mouth opens, head units."""
    return 0.17 * pose.mouth_open


def _normals(shape: Shape, p: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Gradient of the distance by the four corners of a tetrahedron, [3,n] unit length, and which points are hair."""
    out = np.zeros_like(p)
    hair_nearer = np.zeros(p.shape[1], dtype=np.float32)
    for corner in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        k = np.array(corner, dtype=np.float32)[:, None]
        skin, hair = distances(shape, p + np.float32(0.012) * k)
        out += k * np.minimum(skin, hair)
        hair_nearer += skin - hair
    return out / (np.linalg.norm(out, axis=0) + np.float32(1e-9)), hair_nearer > 0


def _trace(
    shape: Shape, origin: Array, toward: Array, depth: Array, margin: float, steps: int
) -> tuple[NDArray[np.int64], Array]:
    """Rays that come within `margin` of the head in at most `steps` steps, and the depth where they do.

    `origin` [3,R] is at depth 0, `toward` [3,1] is where depth grows, `depth` [R] is where each ray starts.
    """
    left = np.arange(depth.size)
    arrived: list[tuple[NDArray[np.int64], Array]] = []
    for step in range(steps):
        gap = np.minimum(*distances(shape, origin + toward * depth)) - np.float32(margin)
        depth = depth - np.float32(0.95) * gap
        if step % 2:
            done = gap < _NEAR * (1.0 + 0.1 * step)
            arrived.append((left[done], depth[done]))
            # behind the widest cross-section a ray that is still well away goes past the head
            on = ~done & (depth > -REACH) & ((depth > -0.9) | (gap < 0.05))
            if not on.any():
                break
            left, depth, origin = left[on], depth[on], origin[:, on]
    return np.concatenate([ray for ray, _ in arrived]), np.concatenate([d for _, d in arrived])


def _coarse(shape: Shape, u: Array, v: Array, back: Array) -> Array:
    """Depth at which the fine rays of each tile may start, [tile rows, tile columns]; NaN where all miss.

    One ray per tile stops as far from the head as the tile's corner is from its centre (cone marching).
    """
    cu, cv = (axis[::_TILE] + np.float32(0.5 * (_TILE - 1)) * (axis[1] - axis[0]) for axis in (u, v))
    gu, gv = (grid.ravel() for grid in np.meshgrid(cu, cv))
    margin = 1.25 * _TILE * math.sqrt(0.5) * float(abs(u[1] - u[0]))
    origin = back[:, :1] * gu + back[:, 1:2] * gv
    found, depth = _trace(shape, origin, back[:, 2:3], np.full_like(gu, _FRONT + margin), margin, _COARSE_STEPS)
    out = np.full(gu.size, np.nan, dtype=np.float32)
    out[found] = depth
    return out.reshape(cv.size, cu.size)


def cast(u: Array, v: Array, who: Identity, pose: Pose) -> Hits:
    """Parallel rays along -z through the evenly spaced grid u [w] x v [h] (head units from the head's centre)."""
    turn = rotation(pose)
    shape = make_shape(who, jaw_drop(pose))
    back = turn.T
    start = np.repeat(np.repeat(_coarse(shape, u, v, back), _TILE, axis=0), _TILE, axis=1)[: v.size, : u.size]
    row, column = np.nonzero(~np.isnan(start))
    origin = back[:, :1] * u[column] + back[:, 1:2] * v[row]
    found, depth = _trace(shape, origin, back[:, 2:3], start[row, column], 0.0, _STEPS)
    point = origin[:, found] + back[:, 2:3] * depth
    normal, hair = _normals(shape, point)
    return Hits(row[found], column[found], point, depth, turn @ normal, hair)
