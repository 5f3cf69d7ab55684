"""All videos of a folder to one shard set. The result depends on the files and options only, not on the workers, nor on
how often the build was killed and started again."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from data_shards.reader import ShardSet
from data_shards.schema import ShardError
from dualforce.codecs import motion_landmarker
from dualforce.codecs.face_landmarker import FaceLandmarkerModel
from dualforce.codecs.motion_sidecar import FORMAT, Motion, SidecarError, find_sidecar, read_sidecar
from dualforce.codecs.protocols import VIDEO_STRIDE, FlameEncoder, MotionEncoder
from dualforce.codecs.registry import (
    audio_encoder_in,
    face_finder,
    flame_encoder,
    motion_encoder_in,
    text_encoder_in,
    video_codec_in,
)
from dualforce.preprocess.assemble import Making, Results, Terms, assemble
from dualforce.preprocess.captions import Caption, embed_captions, read_captions
from dualforce.preprocess.content_id import ContentHashes, content_id, digest, hash_file, surroundings
from dualforce.preprocess.devices import deal, kind_of_devices
from dualforce.preprocess.errors import BuildError, is_disk_full
from dualforce.preprocess.files import find_videos, key_of, name_of
from dualforce.preprocess.identities import read_identities
from dualforce.preprocess.pool import run_tasks
from dualforce.preprocess.process import Job, rejection
from dualforce.preprocess.progress import BuildProgress
from dualforce.preprocess.quality import Limits
from dualforce.preprocess.reasons import Reason
from dualforce.preprocess.report import Entry
from dualforce.preprocess.work import FOLDER, Result, Task, Work, find_result, open_work, perform, times_of


@dataclass(frozen=True)
class BuildOptions:
    """`size`: edge of the crops in pixels; `audio_encoder`: folder of a pretrained speech encoder (None: logmel);
    `video_codec`: folder of a pretrained video codec (None: dct); `text_encoder`: that of a text encoder, for the texts
    of the JSON file `captions` (None: a set without texts);
    `motion_extractor`: LivePortrait's checkpoint (None: motion by `face_landmarker`);
    `flame_encoder`: DECA's or EMOCA's checkpoint (None: no FLAME);
    `face_detector`: insightface's, which then finds the face (None: `face_landmarker` does, or the sidecar says);
    `identities`: JSON file of who is in which video (None: as sidecars say, or each a person of its own); `workers`:
    processes, dealt to the `devices` in turn; `validation_share` of the identities is held out; `licence` is that of
    videos whose sidecar names none, `origin` says where the videos come from; `work`: folder in which finished videos
    are kept for later builds (None: in the folder of the shards, until they are written)."""

    size: int = 128
    face_landmarker: Path | None = None
    audio_encoder: Path | None = None
    video_codec: Path | None = None
    text_encoder: Path | None = None
    captions: Path | None = None
    motion_extractor: Path | None = None
    flame_encoder: Path | None = None
    face_detector: Path | None = None
    identities: Path | None = None
    workers: int = 1
    validation_share: float = 0.2
    limits: Limits = field(default_factory=Limits)
    devices: tuple[str, ...] = ("cpu",)
    licence: str | None = None
    origin: str | None = None
    work: Path | None = None

    def check(self) -> None:
        """Raise BuildError for a value that cannot work."""
        for package in ("av", "scenedetect", "silero_vad"):
            if importlib.util.find_spec(package) is None:
                raise BuildError(f"{package} is not installed: pip install 'dualforce[data]'")
        edge = 2 * VIDEO_STRIDE
        if self.size < edge or self.size % edge:
            raise BuildError(f"--size {self.size}: expected a multiple of {edge}, as latents are patched by 2")
        if (self.captions is None) != (self.text_encoder is None):
            given, other = ("captions", "text-encoder DIR") if self.captions else ("text-encoder", "captions FILE")
            raise BuildError(f"--{given} {self.captions or self.text_encoder}: needs --{other}")
        if self.workers < 1:
            raise BuildError(f"--workers {self.workers}: expected at least 1")
        if self.workers < len(self.devices):
            raise BuildError(f"--workers {self.workers}: expected at least {len(self.devices)}, one for each device")
        if not 0 < self.validation_share < 1:
            raise BuildError(f"--validation-share {self.validation_share}: expected more than 0 and less than 1")


@dataclass(frozen=True)
class BuildReport:
    """The manifest as written and what the build took. `videos` counts files, `used` those that gave a sample,
    `earlier` those that an earlier start had finished."""

    manifest: dict[str, Any]
    videos: int
    used: int
    seconds: float
    earlier: int = 0


@dataclass(frozen=True)
class _Plan:
    """What to do with each video, the motion and FLAME all of them share, the files refused at sight, and the tag of
    the face detector, if there is one."""

    jobs: list[Job]
    motion: dict[str, Any]
    flame: dict[str, Any] | None
    text: dict[str, Any] | None
    rejected: list[dict[str, Any]]
    faces: str | None = None


def build_shards(src: Path, out: Path, options: BuildOptions, console: Console | None = None) -> BuildReport:
    """Build the shard set `out` from the videos under `src`, or what is missing of it after an interrupted build.

    A set that this very build made before is left as it is. Raises BuildError (no video, a device that is not there,
    motion tags mixed, no face landmarker where one is needed, another build in `out`, a full disk, nothing usable),
    CodecError (a model file that cannot be used) and ShardError (`out` holds another set). Finished videos are
    kept in `out` whenever the build does not come to its end. Shows progress on `console` (default: standard error).
    """
    begun = time.monotonic()
    options.check()
    device = kind_of_devices(options.devices)
    videos = find_videos(src)
    if not videos:
        raise BuildError(f"{src}: no video file: expected mp4, mkv, mov, webm, avi or the like in it")
    try:
        with open_work(out, options.work) as work, BuildProgress(console or Console(stderr=True)) as progress:
            times = {video: times_of(video) for video in videos}  # before anything is read
            plan = _plan(src, videos, options, work.scratch, progress)
            extractors = _extractors(options, plan)
            tasks = _tasks(plan.jobs, work, surroundings(extractors, device), times)
            info = _info(options, len(videos), plan, tasks, extractors)
            if (out / "manifest.json").exists():
                manifest = _there(out, info["build"])
                return BuildReport(manifest, len(videos), manifest["info"]["videos_used"], 0.0, len(videos))
            results = _run(tasks, plan.rejected, options, progress)
            terms = Terms(options.validation_share, options.licence, options.origin)
            manifest = assemble(src, out, work, results, Making(extractors, info, terms, begun), progress)
    except OSError as error:
        if is_disk_full(error):
            kept = options.work or out / FOLDER
            raise BuildError(f"{out}: {error.strerror}: finished videos are kept in {kept}: make room and run the same "
                             "command again") from None  # fmt: skip
        raise
    used, earlier = manifest["info"]["videos_used"], sum(entry.earlier for entry in results.entries)
    return BuildReport(manifest, len(videos), used, time.monotonic() - begun, earlier)


def _plan(src: Path, videos: list[Path], options: BuildOptions, scratch: Path, progress: BuildProgress) -> _Plan:
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
    faces = _detector_tag(options.face_detector, options.devices[0])
    named = options.identities and read_identities(options.identities, [name_of(video, src) for video in videos])
    text, captions = _captions(src, videos, options, scratch, progress)
    jobs: list[Job] = []
    rejected: list[dict[str, Any]] = list(broken.values())
    seen: dict[str, str] = {}
    for video, sha256 in _hashes([video for video in videos if video not in broken], options.workers, progress):
        source = name_of(video, src)
        if isinstance(sha256, OSError):
            rejected.append(rejection(source, Reason.E_DECODE, f"cannot read: {sha256.strerror}"))
            continue
        if sha256 in seen:
            rejected.append(rejection(source, Reason.R_DUPLICATE, f"the same bytes as {seen[sha256]}"))
            continue
        seen[sha256] = source
        jobs.append(
            Job(
                video=video,
                source=source,
                key=key_of(video, sha256),
                identity=named[source] if named else identities.get(video, str(Path(source).with_suffix(""))),
                sha256=sha256,
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
                video_codec=options.video_codec,
                caption=captions.get(source),
            )
        )
    return _Plan(jobs, motion_entry, flame_entry, text, rejected, faces)


def _captions(
    src: Path, videos: list[Path], options: BuildOptions, scratch: Path, progress: BuildProgress
) -> tuple[dict[str, Any] | None, dict[str, Caption]]:
    """The extractor entry of the texts and the captions by source; (None, {}) for a set without."""
    if options.captions is None or options.text_encoder is None:
        return None, {}
    texts = read_captions(options.captions, [name_of(video, src) for video in videos])
    encoder = text_encoder_in(options.text_encoder, options.devices[0])

    def track(texts: list[str]) -> Iterator[str]:
        yield from progress.track(texts, len(texts), "embedding texts")

    entry, embedded = {"tag": encoder.tag, "width": encoder.width}, embed_captions(texts, encoder, scratch, track)
    del encoder
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the workers need the room
    return entry, embedded


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


def _detector_tag(detector: Path | None, device: str) -> str | None:
    """Tag of the face detector, if there is one; CodecError for one that cannot be used, before the work starts."""
    if detector is None:
        return None
    finder = face_finder(detector, None, device)
    finder.close()
    return finder.tag


def _extractors(options: BuildOptions, plan: _Plan) -> dict[str, dict[str, Any]]:
    codec, audio = video_codec_in(options.video_codec), audio_encoder_in(options.audio_encoder)
    edge = options.size // VIDEO_STRIDE
    return {
        "video": {"tag": codec.tag, "channels": codec.channels, "height": edge, "width": edge},
        "motion": plan.motion,
        "audio": {"tag": audio.tag, "width": audio.width, "hz": audio.hz},
        **({"flame": plan.flame} if plan.flame else {}),
        **({"text": plan.text} if plan.text else {}),
    }


def _hashes(videos: list[Path], workers: int, progress: BuildProgress) -> Iterator[tuple[Path, str | OSError]]:
    """Every video with the SHA-256 of its content, or why it cannot be read."""

    def read(video: Path) -> tuple[Path, str | OSError]:
        try:
            return video, hash_file(video)
        except OSError as error:
            return video, error

    with ThreadPoolExecutor(workers) as readers:
        yield from progress.track(readers.map(read, videos), len(videos), "reading files")


def _tasks(jobs: list[Job], work: Work, around: Mapping[str, Any], times: Mapping[Path, tuple[int, ...]]) -> list[Task]:
    hashes = ContentHashes()
    return [Task(content_id(job, around, hashes), job, work.results, work.scratch, times[job.video]) for job in jobs]


def _run(tasks: list[Task], rejected: list[dict[str, Any]], options: BuildOptions, progress: BuildProgress) -> Results:
    """Results in the order of the tasks: those kept from an earlier start, and the others, made now."""
    found = {task.id: result for task in tasks if (result := find_result(task.results, task.id)) is not None}
    earlier = set(found)
    if earlier:
        progress.say(
            f"{sum(task.id in earlier for task in tasks)} of {len(tasks)} videos were finished by an earlier start"
        )
    missing = sorted((task for task in tasks if task.id not in found), key=lambda task: -task.job.bytes)
    todo = list({task.id: task for task in missing}.values())
    done = (
        (result or _crashed(task), task.job.bytes, result.length if result else 0.0)
        for task, result in run_tasks(todo, perform, deal(options.devices, options.workers))
    )
    for result in progress.videos(done, len(todo), sum(task.job.bytes for task in todo)):
        found[result.id] = result
    entries = [Entry(task.job, found[task.id], task.id in earlier) for task in tasks]
    named = ({**rejected, "source": entry.job.source} for entry in entries for rejected in entry.result.rejected)
    place = itemgetter("source", "scene", "window")
    order = sorted([*rejected, *named], key=lambda entry: place({"scene": -1, "window": -1, **entry}))
    return Results(entries, order)


def _crashed(task: Task) -> Result:
    detail = "the process that read it died (killed, out of memory, or a fault in a decoder)"
    return Result(task.id, task.scratch, (), (rejection("", Reason.E_CRASH, detail),), 0.0, {}, kept=False)


def _there(out: Path, build: str) -> dict[str, Any]:
    """The manifest of the set in `out`, if this build made it; raises ShardError for another or a damaged one."""
    manifest = ShardSet.open(out).manifest
    if manifest.get("info", {}).get("build") != build:
        raise ShardError(
            f"{out / 'manifest.json'}: a shard set exists here, of other videos or options: expected a new folder"
        )
    return dict(manifest)


def _info(
    options: BuildOptions, videos: int, plan: _Plan, tasks: list[Task], extractors: dict[str, Any]
) -> dict[str, Any]:
    """What the manifest says about the build. `build` is a hash of all that the set depends on."""
    info = {
        "videos": videos,
        "size": options.size,
        "limits": asdict(options.limits),
        "validation_share": options.validation_share,
        "licence": options.licence,
        "origin": options.origin,
        **({"face_detector": plan.faces} if plan.faces else {}),
    }
    names = [(task.id, task.job.source, task.job.key, task.job.identity) for task in tasks]
    return {**info, "build": digest([info, extractors, names, plan.rejected])}
