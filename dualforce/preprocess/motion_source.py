"""Where the motion of a set comes from: the sidecars of all its videos, or their pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualforce.codecs import motion_landmarker
from dualforce.codecs.face_landmarker import FaceLandmarkerModel
from dualforce.codecs.motion_sidecar import FORMAT, Motion, SidecarError, find_sidecar, read_sidecar
from dualforce.codecs.protocols import FlameEncoder, MotionEncoder
from dualforce.codecs.registry import motion_encoder_in
from dualforce.preprocess.errors import BuildError
from dualforce.preprocess.files import name_of
from dualforce.preprocess.job import rejection
from dualforce.preprocess.options import BuildOptions
from dualforce.preprocess.reasons import Reason


@dataclass(frozen=True)
class MotionSource:
    """The set's extractor `entry`, the sidecar of each video, and what they say: who is in a video, and which videos
    cannot be used."""

    entry: dict[str, Any]
    sidecars: dict[Path, Path | None]
    identities: dict[Path, str]
    broken: dict[Path, dict[str, Any]]


def find_motion(src: Path, videos: list[Path], options: BuildOptions) -> MotionSource:
    """Decide where motion comes from. Raises BuildError when some videos have sidecars and others not, when no model
    is given for pictures, and when one is given beside sidecars; CodecError for a model that cannot be used."""
    sidecars = {video: find_sidecar(video) for video in videos}
    without = [video for video, sidecar in sidecars.items() if sidecar is None]
    if len(without) == len(videos):
        entry = _picture_motion(src, options.face_landmarker, options.motion_extractor)
        return MotionSource(entry, sidecars, {}, {})
    motion, identities, broken = _sidecar_motion(src, sidecars)
    if without:
        raise BuildError(
            f"{name_of(without[0], src)}: no sidecar beside it, hence motion of tag {motion_landmarker.TAG!r}, but "
            f"{len(videos) - len(without)} videos have sidecars of tag {motion.tag!r}: expected one tag in a shard set"
        )
    models = {"--motion-extractor": options.motion_extractor, "--face-landmarker": options.face_landmarker}
    for option, model in models.items():
        if model is not None:
            raise BuildError(
                f"{option} {model}: the videos have sidecars with motion of tag {motion.tag!r}: expected one source of "
                "motion"
            )
    entry = {"tag": motion.tag, "width": len(motion.names), "names": list(motion.names)}
    return MotionSource(entry, sidecars, identities, broken)


def extractor_entry(encoder: MotionEncoder | FlameEncoder) -> dict[str, Any]:
    """What the manifest says of an encoder with named numbers."""
    return {"tag": encoder.tag, "width": encoder.width, "names": list(encoder.names)}


def _sidecar_motion(
    src: Path, sidecars: dict[Path, Path | None]
) -> tuple[Motion, dict[Path, str], dict[Path, dict[str, Any]]]:
    """The motion kind that all sidecars share, identities by video, and rejections of videos with broken sidecars."""
    first: tuple[str, Motion] | None = None
    identities: dict[Path, str] = {}
    broken: dict[Path, dict[str, Any]] = {}
    for video, path in sidecars.items():
        if path is None:
            continue
        try:
            sidecar = read_sidecar(path)
        except SidecarError as error:
            broken[video] = rejection(name_of(video, src), Reason.E_SIDECAR, str(error).removeprefix(f"{path}: "))
            continue
        identities[video] = sidecar.identity
        first = first or (path.name, sidecar.motion)
        if (sidecar.motion.tag, sidecar.motion.names) != (first[1].tag, first[1].names):
            raise BuildError(
                f"{path.name}: motion.tag: {sidecar.motion.tag!r} with {len(sidecar.motion.names)} names: expected "
                f"{first[1].tag!r} with {len(first[1].names)} names, as {first[0]} has"
            )
    if first is None:
        reasons = "; ".join(f"{entry['source']}: {entry['detail']}" for entry in list(broken.values())[:3])
        raise BuildError(f"{src}: no sidecar can be used ({len(broken)} broken): {reasons}")
    return first[1], identities, broken


def _picture_motion(src: Path, model: Path | None, extractor: Path | None) -> dict[str, Any]:
    """The extractor entry of motion read from pictures; raises BuildError or CodecError without a working model."""
    if model is None:
        raise BuildError(
            f"{src}: its videos have no {FORMAT} files, so motion must be read from the pictures: expected "
            "--face-landmarker FILE (MediaPipe's face_landmarker.task)"
        )
    with FaceLandmarkerModel(model, video=False):  # a file that cannot be loaded is said before the work starts
        return extractor_entry(motion_encoder_in(model, extractor))
