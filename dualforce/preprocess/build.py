"""All videos of a folder to one shard set. The result depends on the files and options only, not on the workers."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from data_shards.writer import ShardSetWriter
from dualforce.codecs import motion_landmarker
from dualforce.codecs.face_landmarker import FaceLandmarkerModel
from dualforce.codecs.motion_sidecar import FORMAT, Motion, SidecarError, find_sidecar, read_sidecar
from dualforce.codecs.protocols import FlameEncoder, MotionEncoder
from dualforce.codecs.registry import audio_encoder_in, face_finder, flame_encoder, motion_encoder_in, video_codec
from dualforce.preprocess.files import find_videos, key_of, name_of
from dualforce.preprocess.identities import read_identities
from dualforce.preprocess.pool import run_jobs
from dualforce.preprocess.process import VIDEO_TAG, Job, Outcome, load_sample, rejection
from dualforce.preprocess.quality import Limits
from dualforce.preprocess.reasons import Reason
from dualforce.preprocess.split import split_identities

SCRATCH = ".scratch-"


class BuildError(ValueError):
    """A build that cannot start or gave nothing; one line for the user."""


@dataclass(frozen=True)
class BuildOptions:
    """`size`: edge of the crops in pixels; `audio_encoder`: folder of a pretrained speech encoder (None: logmel);
    `motion_extractor`: LivePortrait's checkpoint (None: motion by `face_landmarker`);
    `flame_encoder`: DECA's or EMOCA's checkpoint (None: no FLAME);
    `face_detector`: insightface's, which then finds the face (None: `face_landmarker` does, or the sidecar says);
    `identities`: JSON file of who is in which video (None: as sidecars say, or each a person of its own); `workers`:
    processes; `validation_share` of the identities is held out."""

    size: int = 128
    face_landmarker: Path | None = None
    audio_encoder: Path | None = None
    motion_extractor: Path | None = None
    flame_encoder: Path | None = None
    face_detector: Path | None = None
    identities: Path | None = None
    workers: int = 1
    validation_share: float = 0.2
    limits: Limits = field(default_factory=Limits)

    def check(self) -> None:
        """Raise BuildError for a value that cannot work."""
        stride = video_codec(VIDEO_TAG).stride
        if self.size < 2 * stride or self.size % (2 * stride):
            raise BuildError(f"--size {self.size}: expected a multiple of {2 * stride}, as latents are patched by 2")
        if self.workers < 1:
            raise BuildError(f"--workers {self.workers}: expected at least 1")
        if not 0 < self.validation_share < 1:
            raise BuildError(f"--validation-share {self.validation_share}: expected more than 0 and less than 1")


@dataclass(frozen=True)
class BuildReport:
    """The manifest as written and what the build took. `videos` counts files, `used` those that gave a sample."""

    manifest: dict[str, Any]
    videos: int
    used: int
    seconds: float


@dataclass(frozen=True)
class _Plan:
    """What to do with each video, the motion and FLAME all of them share, the files refused at sight, and the tag of
    the face detector, if there is one."""

    jobs: list[Job]
    motion: dict[str, Any]
    flame: dict[str, Any] | None
    rejected: list[dict[str, Any]]
    faces: str | None = None


def build_shards(src: Path, out: Path, options: BuildOptions, console: Console | None = None) -> BuildReport:
    """Build the shard set `out` from the videos under `src`.

    Raises BuildError (no video, motion tags mixed, no face landmarker where one is needed, nothing usable), CodecError
    (a model file that cannot be used) and ShardError (`out` holds a set already). Shows progress on `console`
    (default: standard error).
    """
    begun = time.monotonic()
    console = console or Console(stderr=True)
    options.check()
    videos = find_videos(src)
    if not videos:
        raise BuildError(f"{src}: no video file: expected mp4, mkv, mov, webm, avi or the like in it")
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob(f"{SCRATCH}*"):  # of a build that was killed
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=out) as scratch, _progress(console) as progress:
        plan = _plan(src, videos, options, Path(scratch), progress)
        with ShardSetWriter(out, _extractors(options, plan)) as writer:
            outcomes = _run(plan.jobs, options.workers, progress)
            rejected = sorted(
                [*plan.rejected, *(entry for outcome in outcomes for entry in outcome.rejected)],
                key=lambda entry: (entry["source"], entry.get("window", -1)),
            )
            splits = _splits(src, plan.jobs, outcomes, rejected, options.validation_share)
            for stem in progress.track([s for o in outcomes for s in o.samples], description="writing shards"):
                sample = load_sample(stem)
                writer.add(splits[sample.identity], sample)
            used = sum(1 for outcome in outcomes if outcome.samples)
            manifest = writer.finish(rejected, {"videos": len(videos), "videos_used": used, **_info(options, plan)})
    return BuildReport(manifest, len(videos), used, time.monotonic() - begun)


def _plan(src: Path, videos: list[Path], options: BuildOptions, scratch: Path, progress: Progress) -> _Plan:
    """Decide where motion comes from, and refuse files whose content an earlier file has."""
    sidecars = {video: find_sidecar(video) for video in videos}
    without = [video for video, sidecar in sidecars.items() if sidecar is None]
    motion, identities, broken = _sidecar_motion(src, sidecars) if len(without) < len(videos) else (None, {}, {})
    if motion is not None and without:
        raise BuildError(
            f"{name_of(without[0], src)}: no sidecar beside it, hence motion of tag {motion_landmarker.TAG!r}, but "
            f"{len(videos) - len(without)} videos have sidecars of tag {motion.tag!r}: expected one tag in a shard set"
        )
    if motion is None:
        motion_entry = _picture_motion(src, options.face_landmarker, options.motion_extractor)
    elif options.motion_extractor is not None:
        raise BuildError(
            f"--motion-extractor {options.motion_extractor}: the videos have sidecars with motion of tag "
            f"{motion.tag!r}: expected one source of motion"
        )
    else:
        motion_entry = {"tag": motion.tag, "width": len(motion.names), "names": list(motion.names)}
    flame_entry = None if options.flame_encoder is None else _entry(flame_encoder(options.flame_encoder))
    faces = _detector_tag(options.face_detector)
    named = options.identities and read_identities(options.identities, [name_of(video, src) for video in videos])
    jobs: list[Job] = []
    rejected: list[dict[str, Any]] = list(broken.values())
    seen: dict[str, str] = {}
    for video in progress.track(videos, description="reading files"):
        source = name_of(video, src)
        if video in broken:
            continue
        try:
            with open(video, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            rejected.append(rejection(source, Reason.E_DECODE, f"cannot read: {error.strerror}"))
            continue
        if digest in seen:
            rejected.append(rejection(source, Reason.R_DUPLICATE, f"the same bytes as {seen[digest]}"))
            continue
        seen[digest] = source
        jobs.append(
            Job(
                video=video,
                source=source,
                key=key_of(video, digest),
                identity=named[source] if named else identities.get(video, str(Path(source).with_suffix(""))),
                sha256=digest,
                bytes=video.stat().st_size,
                size=options.size,
                limits=options.limits,
                sidecar=sidecars[video],
                landmarker=None if sidecars[video] else options.face_landmarker,
                scratch=scratch,
                audio_encoder=options.audio_encoder,
                motion_extractor=options.motion_extractor,
                motion_tag=motion_entry["tag"],
                flame_encoder=options.flame_encoder,
                flame_tag=None if flame_entry is None else flame_entry["tag"],
                face_detector=options.face_detector,
                face_tag=faces,
            )
        )
    return _Plan(jobs, motion_entry, flame_entry, rejected, faces)


def _sidecar_motion(
    src: Path, sidecars: dict[Path, Path | None]
) -> tuple[Motion | None, dict[Path, str], dict[Path, dict[str, Any]]]:
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
        return _entry(motion_encoder_in(model, extractor))


def _entry(encoder: MotionEncoder | FlameEncoder) -> dict[str, Any]:
    return {"tag": encoder.tag, "width": encoder.width, "names": list(encoder.names)}


def _detector_tag(detector: Path | None) -> str | None:
    """Tag of the face detector, if there is one; CodecError for one that cannot be used, before the work starts."""
    if detector is None:
        return None
    finder = face_finder(detector, None)
    finder.close()
    return finder.tag


def _extractors(options: BuildOptions, plan: _Plan) -> dict[str, dict[str, Any]]:
    codec, audio = video_codec(VIDEO_TAG), audio_encoder_in(options.audio_encoder)
    edge = options.size // codec.stride
    flame = {} if plan.flame is None else {"flame": plan.flame}
    return {
        "video": {"tag": codec.tag, "channels": codec.channels, "height": edge, "width": edge},
        "motion": plan.motion,
        "audio": {"tag": audio.tag, "width": audio.width, "hz": audio.hz},
        **flame,
    }


def _run(jobs: list[Job], workers: int, progress: Progress) -> list[Outcome]:
    """Outcomes in the order of the jobs."""
    task = progress.add_task("videos to samples", total=len(jobs))
    outcomes: dict[str, Outcome] = {}
    for outcome in run_jobs(jobs, workers):
        outcomes[outcome.source] = outcome
        progress.advance(task)
    return [outcomes[job.source] for job in jobs]


def _splits(
    src: Path, jobs: list[Job], outcomes: list[Outcome], rejected: list[dict[str, Any]], share: float
) -> dict[str, str]:
    """Split of every identity that has a sample; raises BuildError when none has."""
    identities = [job.identity for job, outcome in zip(jobs, outcomes, strict=True) if outcome.samples]
    if not identities:
        reasons = "; ".join(f"{entry['source']}: {entry['reason']}: {entry['detail']}" for entry in rejected[:5])
        more = f"; and {len(rejected) - 5} more" if len(rejected) > 5 else ""
        raise BuildError(f"{src}: no video gave a sample: {reasons}{more}")
    return split_identities(identities, share)


def _info(options: BuildOptions, plan: _Plan) -> dict[str, Any]:
    limits = {name: getattr(options.limits, name) for name in options.limits.__dataclass_fields__}
    detector = {"face_detector": plan.faces} if plan.faces else {}
    return {"size": options.size, "limits": limits, "validation_share": options.validation_share, **detector}


def _progress(console: Console) -> Progress:
    columns: Iterator[Any] = iter(
        (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    )
    return Progress(*columns, console=console)
