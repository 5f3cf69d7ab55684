"""Codecs by tag."""

from __future__ import annotations

from pathlib import Path

from dualforce.codecs import audio_logmel, audio_speech, motion_landmarker, video_dct
from dualforce.codecs.protocols import AudioEncoder, CodecError, MotionEncoder, VideoCodec


def video_codec(tag: str) -> VideoCodec:
    """The video codec of a tag; raises CodecError for an unknown one."""
    if tag == video_dct.TAG:
        return video_dct.DctVideoCodec()
    raise CodecError(f"video codec {tag!r}: unknown; expected {video_dct.TAG!r}")


def audio_encoder(tag: str, folder: Path | None = None) -> AudioEncoder:
    """The audio encoder of a tag; `folder` holds the pretrained model where the tag names one.

    Raises CodecError for an unknown tag, without the folder, or for a folder with another model.
    """
    if tag == audio_logmel.TAG:
        return audio_logmel.LogMelAudio()
    if tag.partition("-")[0] not in audio_speech.KINDS:
        kinds = " or ".join(audio_speech.KINDS)
        raise CodecError(f"audio encoder {tag!r}: unknown; expected {audio_logmel.TAG!r} or that of a {kinds} model")
    if folder is None:
        raise CodecError(f"audio {tag!r}: needs --audio-encoder DIR, the folder of the model with this tag")
    found = audio_speech.SpeechFeatures(folder)
    if found.tag != tag:
        raise CodecError(f"--audio-encoder {folder}: is {found.tag!r}: expected {tag!r}")
    return found


def audio_encoder_in(folder: Path | None) -> AudioEncoder:
    """The pretrained encoder of a folder, or the features that need no weights; CodecError for another folder."""
    return audio_logmel.LogMelAudio() if folder is None else audio_speech.SpeechFeatures(folder)


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
