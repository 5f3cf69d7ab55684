"""One video's work, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualforce.codecs import motion_landmarker
from dualforce.preprocess.captions import Caption
from dualforce.preprocess.quality import Limits
from dualforce.preprocess.reasons import Reason

Rejections = list[dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """One video: where it is, what it is called in the shards, and how to treat it.

    Either `sidecar` or `landmarker` is set: where motion comes from, and faces too unless there is a `face_detector`.
    `motion_tag`, `flame_tag` and `face_tag` are those of the shard set: a model exchanged meanwhile is refused.
    """

    video: Path
    source: str
    key: str
    identity: str
    sha256: str
    bytes: int
    size: int
    limits: Limits
    sidecar: Path | None
    landmarker: Path | None
    scratch: Path
    audio_encoder: Path | None = None  # folder of a pretrained one; None: features without weights
    motion_extractor: Path | None = None  # LivePortrait's checkpoint; None: MediaPipe's motion
    motion_tag: str = motion_landmarker.TAG
    flame_encoder: Path | None = None  # DECA's or EMOCA's checkpoint; None: no FLAME
    flame_tag: str | None = None
    face_detector: Path | None = None  # insightface's, the model with `face_tag`
    face_tag: str | None = None
    video_codec: Path | None = None  # folder of a pretrained one; None: dct
    caption: Caption | None = None  # None: a set without texts


@dataclass(frozen=True)
class Outcome:
    """What became of a video: files of its samples (stems in the scratch folder) in order, and rejections."""

    source: str
    samples: tuple[Path, ...] = ()
    rejected: tuple[dict[str, Any], ...] = ()


def rejection(source: str, reason: Reason, detail: str, window: int | None = None) -> dict[str, Any]:
    """One entry of the manifest's list."""
    entry: dict[str, Any] = {"source": source, "reason": str(reason), "detail": detail}
    return entry if window is None else {**entry, "window": window}
