"""One video through all stages, to samples on the disk or to reasons why not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_shards.schema import ClipSample
from dualforce.codecs import motion_landmarker
from dualforce.codecs.face_box import Boxes, Pixels, resize, square_boxes
from dualforce.codecs.media import MediaError, MediaInfo, Treatment, probe, stored_sound
from dualforce.codecs.media_clock import PlacedSound
from dualforce.codecs.motion_sidecar import Sidecar, SidecarError, read_sidecar
from dualforce.codecs.protocols import FlameEncoder, MotionEncoder, VideoCodec
from dualforce.preprocess import features, quality
from dualforce.preprocess.captions import caption_embedding
from dualforce.preprocess.errors import is_disk_full
from dualforce.preprocess.face_crop import CropTrack, crop_frames, plan_crop
from dualforce.preprocess.face_track import FaceTrack, track_faces, track_sidecar
from dualforce.preprocess.job import Job, Outcome, Rejections, rejection
from dualforce.preprocess.models import Models
from dualforce.preprocess.quality import Limits
from dualforce.preprocess.reasons import Reason, Rejected
from dualforce.preprocess.sample_file import store_sample
from dualforce.preprocess.scenes import Scene, Scenes, find_scenes
from dualforce.preprocess.speech import SpeechTrack, find_speech
from dualforce.preprocess.window_faces import boxes_in_crops, find_faces
from dualforce.preprocess.windows import Window, check_window, plan_windows


@dataclass
class _Clip:
    """A video that passed the checks, with what its windows share. `usable` are the scenes that passed."""

    job: Job
    limits: Limits
    info: MediaInfo
    treatment: Treatment
    sidecar: Sidecar | None
    sound: PlacedSound
    speech: SpeechTrack
    scenes: Scenes
    usable: list[Scene]
    track: FaceTrack
    crop: CropTrack
    audio: features.AudioTrack
    loudness: features.Loudness
    checks: Mapping[int, dict[str, float]]  # of the scenes that passed, by their index
    motion: MotionEncoder | None  # None: the sidecar's
    flame: FlameEncoder | None
    codec: VideoCodec
    rejected: Rejections = field(default_factory=list)

    def reject(self, window: Window, error: Rejected) -> None:
        self.rejected.append(rejection(self.job.source, error.reason, error.detail, window.index))


def process_video(job: Job, models: Models | None = None) -> Outcome:
    """Run all stages on one video and write its samples to the scratch folder. Raises nothing that the video can cause:
    whatever is wrong with it is in `rejected`. Raises OSError when the disk is full.

    `models` are those of the process, kept from video to video; None: they are loaded for this one. After a fault that
    nobody foresaw they are forgotten, lest it was theirs.
    """
    if models is None:
        with closing(Models()) as own:
            return process_video(job, own)
    try:
        with ExitStack() as files:
            clip = _prepare(job, models, files)
            samples = tuple(store_sample(job.scratch, sample) for sample in _samples(clip))
            rejected = tuple(clip.rejected)
    except Rejected as error:
        samples, rejected = (), (rejection(job.source, error.reason, error.detail),)
    except MediaError as error:
        samples, rejected = (), (rejection(job.source, Reason.E_DECODE, error.cause),)
    except SidecarError as error:
        samples, rejected = (), (rejection(job.source, Reason.E_SIDECAR, str(error)),)
    except Exception as error:
        # One odd file among thousands must not end the build, whatever a decoder or detector makes of it; the type and
        # text are kept, and a fault that hits every file still ends it, for want of samples.
        models.close()
        if is_disk_full(error):
            raise
        detail = f"{type(error).__name__}: {error}".splitlines()[0]
        samples, rejected = (), (rejection(job.source, Reason.E_INTERNAL, detail),)
    return Outcome(job.source, samples, rejected)


def _prepare(job: Job, models: Models, files: ExitStack) -> _Clip:
    """The stages that look at the whole video: sound, speech, scenes, face track, checks, crop, audio features. Sound
    and features, which may be long, are on the disk until `files` is closed."""
    info = probe(job.video)
    sidecar = read_sidecar(job.sidecar) if job.sidecar is not None else None
    limits = job.limits.for_rendered() if sidecar else job.limits
    sound = files.enter_context(stored_sound(job.video, info.zero, job.scratch))
    sound, level = quality.check_sound(sound, limits)
    treatment = Treatment()
    scenes = find_scenes(job.video, treatment)
    longest = max(scenes.parts, key=lambda scene: scene.length)
    several = f" in the longest of {len(scenes.parts)} scenes" if len(scenes.parts) > 1 else ""
    quality.check_length(longest, limits, several)
    rejected: Rejections = []
    long = _passing(job, scenes, scenes.parts, rejected, lambda scene: quality.check_length(scene, limits))
    if sidecar is not None:
        track = track_sidecar(scenes.frames, (info.width, info.height), sidecar)
    if sidecar is None or job.face_detector is not None:
        track = track_faces(job.video, models.faces(job))
    usable = _passing(
        job, scenes, long, rejected,
        lambda scene: quality.check_faces(track.within(scene.start, scene.stop), job.size, limits),
    )  # fmt: skip
    return _Clip(
        job=job,
        limits=limits,
        info=info,
        treatment=treatment,
        sidecar=sidecar,
        sound=sound,
        speech=find_speech(sound.wave, models.speech()),
        scenes=scenes,
        usable=usable,
        track=track,
        crop=plan_crop(track, usable),
        audio=files.enter_context(features.audio_track(models.audio(job), sound.wave, job.scratch)),
        loudness=features.loudness(sound.wave),
        checks={scene.index: quality.report(track.within(scene.start, scene.stop), sound, level) for scene in usable},
        motion=None if sidecar else models.motion(job),
        flame=models.flame(job),
        codec=models.video(job),
        rejected=rejected,
    )


def _passing(
    job: Job,
    scenes: Scenes,
    candidates: Iterable[Scene],
    rejected: list[dict[str, Any]],
    check: Callable[[Scene], None],
) -> list[Scene]:
    """The scenes that pass a check. What is wrong with the only scene of a video is wrong with the video: raises
    Rejected; of several scenes each is rejected by itself."""
    passed = []
    for scene in candidates:
        try:
            check(scene)
            passed.append(scene)
        except Rejected as error:
            if len(scenes.parts) == 1:
                raise
            entry = rejection(job.source, error.reason, f"{scene}: {error.detail}")
            rejected.append({**entry, "scene": scene.index})
    return passed


def _samples(clip: _Clip) -> Iterator[ClipSample]:
    """The samples of the windows that hold up; the others go to `clip.rejected`."""
    windows: list[Window] = []
    figures: dict[int, dict[str, float]] = {}
    for window in plan_windows(clip.usable):
        try:
            check_window(window, clip.sound, clip.crop.cuts)
            figures[window.index] = _window_figures(clip, window)
            windows.append(window)
        except Rejected as error:
            clip.reject(window, error)
    for window, crops in _window_crops(clip, windows):
        try:
            measured = figures[window.index] | quality.check_sharpness(crops, clip.limits)
            yield _sample(clip, window, crops, measured)
        except Rejected as error:
            clip.reject(window, error)


def _window_figures(clip: _Clip, window: Window) -> dict[str, float]:
    """What is measured of a window before its pictures are cut out. Raises Rejected."""
    return {
        **quality.check_window_sound(clip.sound.wave[window.samples], clip.limits),
        **quality.check_speech(clip.speech.share(window.samples), clip.limits),
        **quality.check_yaw(clip.track.within(window.start, window.start + window.length), clip.limits),
    }


def _window_crops(clip: _Clip, windows: list[Window]) -> Iterator[tuple[Window, Pixels]]:
    """Crops [81,S,S,3] of one window after the other: one window of pictures is held at a time."""
    # By an encoder or a check that needs more pixels.
    looked_at = clip.sidecar is None or clip.flame is not None or clip.limits.judge_rendered
    size = max(clip.job.size, motion_landmarker.CROP_SIZE) if looked_at else clip.job.size
    frames = crop_frames(clip.job.video, clip.crop, [window.frames for window in windows], size)
    for window in windows:
        crops = np.empty((window.length, size, size, 3), np.uint8)  # at once: 81 arrays would each pin the heap
        for place in range(window.length):
            crops[place] = next(frames)[1]
        yield window, crops


def _sample(clip: _Clip, window: Window, crops: Pixels, measured: dict[str, float]) -> ClipSample:
    """Every stream of one window. Raises Rejected."""
    job = clip.job
    faces = _faces(clip, window, crops)
    motion = _motion(clip, window, crops, faces)
    flame = None if clip.flame is None else features.flame_parameters(clip.flame, crops, faces)
    pixels = np.stack([resize(picture, job.size) for picture in crops])
    return ClipSample(
        key=f"{job.key}-w{window.index:04d}",
        identity=job.identity,
        video=features.video_latents(clip.codec, pixels).data,
        reference=features.reference_latent(clip.codec, pixels).data,
        struct=motion.data,
        audio=features.audio_window(clip.audio, window).data,
        voiced=features.voiced_frames(clip.loudness, window),
        flame=None if flame is None else flame.data,
        flame_valid=None if flame is None else flame.valid,
        text=caption_embedding(job.caption).data if job.caption else None,
        meta=_meta(clip, window, motion.tag, measured, flame),
    )


def _faces(clip: _Clip, window: Window, crops: Pixels) -> Boxes:
    """Face boxes [P,4] in pixels of the window's crops, NaN where there is no face; [0,4] when nothing needs them."""
    if clip.flame is None and clip.job.motion_extractor is None:
        return np.empty((0, 4))
    if clip.sidecar is not None:
        part = slice(window.start, window.start + window.length)
        return boxes_in_crops(clip.sidecar.face_boxes[part], clip.crop.squares[part], crops.shape[1])
    if clip.job.landmarker is None:
        raise ValueError(f"{clip.job.source}: no face landmarker: expected one")
    return find_faces(crops, clip.job.landmarker)


def _motion(clip: _Clip, window: Window, crops: Pixels, faces: Boxes) -> features.Extracted:
    if clip.sidecar is not None:
        return features.sidecar_motion(clip.sidecar.motion, window)
    if clip.motion is None:
        raise ValueError(f"{clip.job.source}: no motion encoder: expected one, as there is no sidecar")
    if clip.job.motion_extractor is not None:
        features.check_faces_seen(faces)
    return features.picture_motion(clip.motion, crops)


def _meta(
    clip: _Clip, window: Window, motion_tag: str, measured: dict[str, float], flame: features.ExtractedFlame | None
) -> dict[str, Any]:
    """Where the sample comes from and how it was made; crop boxes (x0, y0, x1, y1) in source pixels per frame."""
    boxes = square_boxes(clip.crop.squares[window.start : window.start + window.length])
    info, scene = clip.info, clip.scenes.parts[window.scene]
    meta: dict[str, Any] = {
        "source": clip.job.source,
        "sha256": clip.job.sha256,
        "window": window.index,
        "first_pixel_frame": window.start,
        "scene": {"index": scene.index, "of": len(clip.scenes.parts), "first": scene.start, "frames": scene.length},
        "file": info.entry(),
        "crop": {"tag": clip.crop.tag, "boxes": boxes.round(1).tolist()},
        "tags": {"video": clip.codec.tag, "motion": motion_tag, "audio": clip.audio.tag},
        "finders": {
            "scenes": clip.scenes.finder.entry(),
            "faces": clip.track.finder.entry(),
            "speech": clip.speech.finder.entry(),
        },
        "checks": clip.checks[scene.index] | measured,
    }
    if flame is not None:
        meta["tags"]["flame"] = flame.tag
        meta["checks"]["flame_valid"] = round(float(flame.valid.float().mean()), 4)
    if clip.job.caption is not None:
        meta["tags"]["text"], meta["caption"] = clip.job.caption.tag, clip.job.caption.text
    if coded := clip.codec.coded(clip.job.size, clip.job.size):
        meta["coded"] = coded
    if treated := clip.treatment.entry():
        meta["file"]["pictures"] = treated
    if clip.sidecar is not None:
        meta |= {"licence": clip.sidecar.licence, "audio_offset_s": clip.sidecar.audio_offset}
    if unjudged := _not_judged(clip, measured):
        meta["not_judged"] = unjudged
    return meta


def _not_judged(clip: _Clip, measured: Mapping[str, float]) -> list[str]:
    """What was not asked of a window: of rendered clips by the limits, and what could not be measured."""
    if clip.sidecar is not None and not clip.limits.judge_rendered:
        return list(quality.UNJUDGED)
    return [name for name in quality.UNJUDGED if name not in measured]
