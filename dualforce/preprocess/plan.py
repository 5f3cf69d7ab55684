"""What to do with each video of a build, decided before any is worked on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_shards.manifest import room_of
from dualforce.codecs.protocols import VIDEO_STRIDE
from dualforce.codecs.registry import (
    audio_encoder_in,
    face_finder,
    flame_encoder,
    text_encoder_in,
    text_encoder_named,
    video_codec_in,
)
from dualforce.preprocess.captions import Caption, embed_captions, read_captions
from dualforce.preprocess.content_id import digest, hash_file, surroundings
from dualforce.preprocess.devices import kind_of_devices
from dualforce.preprocess.files import key_of, name_of
from dualforce.preprocess.identities import read_identities
from dualforce.preprocess.job import Job, rejection
from dualforce.preprocess.motion_source import MotionSource, extractor_entry, find_motion
from dualforce.preprocess.options import BuildOptions
from dualforce.preprocess.progress import BuildProgress
from dualforce.preprocess.reasons import Reason
from dualforce.preprocess.work import Work


@dataclass(frozen=True)
class Plan:
    """What to do with each video, the motion and FLAME all of them share, the files refused at sight, and the tag of
    the face detector, if there is one."""

    jobs: list[Job]
    motion: dict[str, Any]
    flame: dict[str, Any] | None
    text: dict[str, Any] | None
    rejected: list[dict[str, Any]]
    faces: str | None = None
    sidecars: bool = False  # of the videos say how faces move


def make_plan(src: Path, videos: list[Path], options: BuildOptions, work: Work, progress: BuildProgress) -> Plan:
    """Decide where motion comes from, and refuse files whose content an earlier file has.

    Raises ShardError, before a video is read, for videos of more people than a set may have.
    """
    motion = find_motion(src, videos, options)
    flame_entry = None if options.flame_encoder is None else extractor_entry(flame_encoder(options.flame_encoder))
    faces = _detector_tag(options.face_detector, options.devices[0])
    people = _people(src, videos, options, motion)
    text, captions = _captions(src, videos, options, work, progress)
    jobs: list[Job] = []
    rejected: list[dict[str, Any]] = list(motion.broken.values())
    seen: dict[str, str] = {}
    for video, sha256 in _hashes([video for video in videos if video not in motion.broken], options.workers, progress):
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
                identity=people[video],
                sha256=sha256,
                bytes=video.stat().st_size,
                size=options.size,
                limits=options.limits,
                sidecar=motion.sidecars[video],
                landmarker=None if motion.sidecars[video] else options.face_landmarker,
                scratch=work.scratch,
                audio_encoder=options.audio_encoder,
                motion_extractor=options.motion_extractor,
                motion_tag=motion.entry["tag"],
                flame_encoder=options.flame_encoder,
                flame_tag=None if flame_entry is None else flame_entry["tag"],
                face_detector=options.face_detector,
                face_tag=faces,
                video_codec=options.video_codec,
                caption=captions.get(source),
            )
        )
    return Plan(jobs, motion.entry, flame_entry, text, rejected, faces, any(motion.sidecars.values()))


def _people(src: Path, videos: list[Path], options: BuildOptions, motion: MotionSource) -> dict[Path, str]:
    """Who is in each video that has no broken sidecar."""
    named = options.identities and read_identities(options.identities, [name_of(video, src) for video in videos])
    found = {}
    for video in (video for video in videos if video not in motion.broken):
        source = name_of(video, src)
        found[video] = named[source] if named else motion.identities.get(video, str(Path(source).with_suffix("")))
    room_of(found.values()).check(1, str(src))
    return found


def _captions(
    src: Path, videos: list[Path], options: BuildOptions, work: Work, progress: BuildProgress
) -> tuple[dict[str, Any] | None, dict[str, Caption]]:
    """The extractor entry of the texts and the captions by source; (None, {}) for a set without."""
    folder = options.text_encoder
    if options.captions is None or folder is None:
        return None, {}
    texts = read_captions(options.captions, [name_of(video, src) for video in videos])
    tag, width = text_encoder_named(folder)
    entry = {"tag": tag, "width": width}

    def track(texts: list[str]) -> Iterator[str]:
        yield from progress.track(texts, len(texts), "embedding texts")

    around = digest(surroundings({"text": entry}, kind_of_devices(options.devices)))
    embedded = embed_captions(
        texts, tag, lambda: text_encoder_in(folder, options.devices[0]), work.texts, around, track
    )
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the encoder is gone, and the workers need the room
    return entry, embedded


def extractors_of(options: BuildOptions, plan: Plan) -> dict[str, dict[str, Any]]:
    """The manifest's table of extractors."""
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


def _detector_tag(detector: Path | None, device: str) -> str | None:
    """Tag of the face detector, if there is one; CodecError for one that cannot be used, before the work starts."""
    if detector is None:
        return None
    finder = face_finder(detector, None, device)
    finder.close()
    return finder.tag
