"""The networks of one process, kept from one video to the next."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

from dualforce.codecs.protocols import AudioEncoder, FaceFinder, FlameEncoder, MotionEncoder, VideoCodec
from dualforce.codecs.registry import audio_encoder_in, face_finder, flame_encoder, motion_encoder, video_codec_in
from dualforce.codecs.voice_activity import VoiceActivity
from dualforce.preprocess.job import Job

P = ParamSpec("P")
T = TypeVar("T")


class Models:
    """The networks of jobs on one device, each loaded when a job first asks for it. They remember nothing of what they
    have seen: what becomes of a video does not depend on those before it. Each method raises CodecError for a model
    that cannot be used, or is not the one that the job names by its tag.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._loaded: dict[tuple[Any, ...], Any] = {}

    def audio(self, job: Job) -> AudioEncoder:
        return self._kept(audio_encoder_in, job.audio_encoder, self._device)

    def motion(self, job: Job) -> MotionEncoder:
        return self._kept(motion_encoder, job.motion_tag, job.landmarker, job.motion_extractor, self._device)

    def flame(self, job: Job) -> FlameEncoder | None:
        """None where the job asks for none."""
        if job.flame_encoder is None:
            return None
        return self._kept(flame_encoder, job.flame_encoder, job.flame_tag, self._device)

    def video(self, job: Job) -> VideoCodec:
        return self._kept(video_codec_in, job.video_codec, self._device)

    def faces(self, job: Job) -> FaceFinder:
        return self._kept(face_finder, job.face_detector, job.landmarker, self._device, job.face_tag)

    def speech(self) -> VoiceActivity:
        return self._kept(VoiceActivity)

    def close(self) -> None:
        """Give all models up: a job that comes after loads them anew."""
        loaded, self._loaded = self._loaded, {}
        for model in loaded.values():
            if hasattr(model, "close"):
                with suppress(Exception):  # one that is broken may not close either; it is gone all the same
                    model.close()

    def _kept(self, load: Callable[P, T], *given: P.args, **named: P.kwargs) -> T:
        key = (load, given, tuple(named.items()))
        if key not in self._loaded:
            self._loaded[key] = load(*given, **named)
        found: T = self._loaded[key]
        return found
