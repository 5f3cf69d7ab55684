"""Sidecar files: the known motion and face boxes of a rendered clip, or a motion given by hand.

A sidecar is NAME.json beside NAME.mp4, with `"format": "dualforce-sidecar"`. A motion file for generation is the same
JSON with at least `format`, `version` and `motion`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dualforce.config import ConfigError
from dualforce.config_file import decode_json, read_json
from dualforce.types import FPS

FORMAT = "dualforce-sidecar"
VERSION = 1
MAX_TEXT = 500  # characters of identity and licence: they stand in the record of every sample
MAX_TAG = 200  # characters, of a name too; a shard set takes no longer tags, and has the names in its manifest


class SidecarError(ValueError):
    """A sidecar that cannot be used: `file: key: value: expectation`."""


@dataclass(frozen=True)
class Motion:
    """Motion [rows, len(names)] fp32, one row per pixel frame at 25 frames a second, with its extractor's tag."""

    tag: str
    names: tuple[str, ...]
    values: Tensor


@dataclass(frozen=True)
class Sidecar:
    """The truth stored beside a clip. `face_boxes` [P,4] float64 (x0, y0, x1, y1) in pixels of the clip; the sound
    comes `audio_offset` seconds later than the motion that goes with it."""

    identity: str
    licence: str | None
    motion: Motion
    face_boxes: NDArray[np.float64]
    audio_offset: float


def find_sidecar(video: Path) -> Path | None:
    """The sidecar beside a video, or None. Another program's JSON of that name is none of ours and is left alone. One
    that is damaged or cannot be read is returned, and refused by `read_sidecar`."""
    path = video.with_suffix(".json")
    try:
        if not path.is_file():
            return None
    except OSError:  # where the name has become too long
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    except OSError:
        return path  # for `read_sidecar` to say so: passed over, it would have motion mean something else
    try:
        head = decode_json(text)
    except (ValueError, RecursionError):
        return path if f'"{FORMAT}"' in text else None  # one that was cut short, or has a key twice, too
    return path if isinstance(head, dict) and head.get("format") == FORMAT else None


def read_motion(path: Path) -> Motion:
    """The motion of a motion file or sidecar. Raises SidecarError."""
    return _motion(_read(path), path)


def read_sidecar(path: Path) -> Sidecar:
    """A clip's sidecar, whole. Raises SidecarError naming file, key, value and expectation."""
    data = _read(path)
    motion = _motion(data, path)
    identity = data.get("identity")
    if not isinstance(identity, str) or not identity:
        raise SidecarError(f"{path}: identity: {_short(identity)}: expected a name")
    _check_length(identity, MAX_TEXT, path, "identity")
    licence = data.get("licence")
    if licence is not None and not isinstance(licence, str):
        raise SidecarError(f"{path}: licence: {_short(licence)}: expected text")
    _check_length(licence or "", MAX_TEXT, path, "licence")
    boxes = _table(data.get("face_boxes"), 4, path, "face_boxes")
    if len(boxes) != len(motion.values):
        raise SidecarError(
            f"{path}: face_boxes: {len(boxes)} rows: expected {len(motion.values)}, as motion.values has"
        )
    if not (boxes[:, 2:] > boxes[:, :2]).all():
        row = int(np.argmin((boxes[:, 2:] > boxes[:, :2]).all(axis=1)))
        raise SidecarError(f"{path}: face_boxes[{row}]: {boxes[row].tolist()}: expected x0 < x1 and y0 < y1")
    offset = _table([[data.get("audio_offset_s", 0.0)]], 1, path, "audio_offset_s")
    return Sidecar(identity, licence, motion, boxes, float(offset[0, 0]))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = read_json(path)
    except ConfigError as error:
        raise SidecarError(str(error)) from None
    if data.get("format") != FORMAT:
        raise SidecarError(f"{path}: format: {str(data.get('format'))[:40]!r}: expected {FORMAT!r}")
    if data.get("version") != VERSION:
        raise SidecarError(f"{path}: version: {_short(data.get('version'))}: expected {VERSION}")
    if data.get("fps", FPS) != FPS:
        raise SidecarError(f"{path}: fps: {_short(data['fps'])}: expected {FPS}")
    return data


def _motion(data: dict[str, Any], path: Path) -> Motion:
    motion = data.get("motion")
    if not isinstance(motion, dict):
        raise SidecarError(f"{path}: motion: {str(motion)[:40]!r}: expected an object with tag, names and values")
    tag, names = motion.get("tag"), motion.get("names")
    if not isinstance(tag, str) or not tag:
        raise SidecarError(f"{path}: motion.tag: {_short(tag)}: expected the extractor's tag")
    _check_length(tag, MAX_TAG, path, "motion.tag")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise SidecarError(f"{path}: motion.names: {str(names)[:40]!r}: expected a list of names")
    for index, name in enumerate(names):
        _check_length(name, MAX_TAG, path, f"motion.names[{index}]")
    if len(set(names)) != len(names):
        raise SidecarError(f"{path}: motion.names: a name occurs twice: expected different names")
    values = _table(motion.get("values"), len(names), path, "motion.values")
    return Motion(tag, tuple(names), torch.from_numpy(values).float())


def _short(value: object) -> str:
    """For a message: a file of any size may have anything here."""
    return repr(value)[:40]


def _check_length(text: str, most: int, path: Path, key: str) -> None:
    if len(text) > most:
        raise SidecarError(f"{path}: {key}: {len(text)} characters: expected at most {most}")


def _table(rows: Any, width: int, path: Path, key: str) -> NDArray[np.float64]:
    """Rows of finite numbers as [rows, width] float64."""
    if not isinstance(rows, list) or not rows:
        raise SidecarError(f"{path}: {key}: {str(rows)[:40]!r}: expected one row per pixel frame")
    for index, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != width:
            size = len(row) if isinstance(row, list) else type(row).__name__
            raise SidecarError(f"{path}: {key}[{index}]: {size}: expected {width} numbers")
        for value in row:
            if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
                raise SidecarError(f"{path}: {key}[{index}]: {_short(value)}: expected a finite number")
    return np.array(rows, np.float64)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that is too large for a float
        return False
