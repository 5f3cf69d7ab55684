"""Codecs by tag."""

from __future__ import annotations

from pathlib import Path

from dualforce.codecs import audio_logmel, motion_landmarker, video_dct
from dualforce.codecs.protocols import AudioEncoder, CodecError, MotionEncoder, VideoCodec


def video_codec(tag: str) -> VideoCodec:
    """The video codec of a tag; raises CodecError for an unknown one."""
    if tag == video_dct.TAG:
        return video_dct.DctVideoCodec()
    raise CodecError(f"video codec {tag!r}: unknown; expected {video_dct.TAG!r}")


def audio_encoder(tag: str) -> AudioEncoder:
    """The audio encoder of a tag; raises CodecError for an unknown one."""
    if tag == audio_logmel.TAG:
        return audio_logmel.LogMelAudio()
    raise CodecError(f"audio encoder {tag!r}: unknown; expected {audio_logmel.TAG!r}")


def motion_encoder(tag: str, face_landmarker: Path | None) -> MotionEncoder:
    """The motion encoder of a tag, with the model file it needs. Raises CodecError for a tag whose motion cannot be
    computed from pictures (a rendered clip's sidecar has it) or when the model file is not given or not there."""
    if tag != motion_landmarker.TAG:
        raise CodecError(
            f"motion {tag!r}: no encoder computes it from pictures; expected a motion file with this tag, or motion of "
            f"tag {motion_landmarker.TAG!r}"
        )
    if face_landmarker is None:
        raise CodecError(f"motion {tag!r}: needs --face-landmarker FILE (MediaPipe's face_landmarker.task)")
    return motion_landmarker.LandmarkerMotion(face_landmarker)
