"""Codecs by tag."""

from __future__ import annotations

from pathlib import Path

import torch

from dualforce.codecs import (
    audio_logmel,
    audio_speech,
    flame_deca,
    motion_landmarker,
    motion_liveportrait,
    text_umt5,
    video_dct,
    video_wan,
)
from dualforce.codecs.face_landmarker import FaceLandmarkerModel
from dualforce.codecs.face_retina import RetinaFaceModel
from dualforce.codecs.protocols import (
    AudioEncoder,
    CodecError,
    FaceFinder,
    FlameEncoder,
    MotionEncoder,
    TextEncoder,
    VideoCodec,
)


def video_codec(tag: str, folder: Path | None = None, device: str | torch.device = "cpu") -> VideoCodec:
    """The video codec of a tag on `device`; `folder` holds the pretrained model where the tag names one.

    Raises CodecError for an unknown tag, without the folder or with one that the tag needs not, or for a folder with
    another model.
    """
    if tag == video_dct.TAG:
        if folder is not None:
            raise CodecError(f"video codec in {folder}: not used: expected none, as the video codec is {tag!r}")
        return video_dct.DctVideoCodec()
    if tag.partition("-")[0] != video_wan.KIND:
        raise CodecError(f"video codec {tag!r}: unknown; expected {video_dct.TAG!r} or that of a {video_wan.KIND} VAE")
    if folder is None:
        raise CodecError(f"video codec {tag!r}: needs --video-codec DIR, the folder of the VAE with this tag")
    found = video_wan.WanVideoCodec(folder, device)
    if found.tag != tag:
        raise CodecError(f"video codec in {folder}: is {found.tag!r}: expected {tag!r}")
    return found


def video_codec_in(folder: Path | None, device: str | torch.device = "cpu") -> VideoCodec:
    """The pretrained VAE of a folder on `device`, or the codec that needs no weights; CodecError for another folder."""
    return video_dct.DctVideoCodec() if folder is None else video_wan.WanVideoCodec(folder, device)


def audio_encoder(tag: str, folder: Path | None = None, device: str | torch.device = "cpu") -> AudioEncoder:
    """The audio encoder of a tag on `device`; `folder` holds the pretrained model where the tag names one.

    Raises CodecError for an unknown tag, without the folder or with one that the tag needs not, or for a folder with
    another model.
    """
    if tag == audio_logmel.TAG:
        if folder is not None:
            raise CodecError(f"--audio-encoder {folder}: not used: expected none, as the audio encoder is {tag!r}")
        return audio_logmel.LogMelAudio()
    if tag.partition("-")[0] not in audio_speech.KINDS:
        kinds = " or ".join(audio_speech.KINDS)
        raise CodecError(f"audio encoder {tag!r}: unknown; expected {audio_logmel.TAG!r} or that of a {kinds} model")
    if folder is None:
        raise CodecError(f"audio {tag!r}: needs --audio-encoder DIR, the folder of the model with this tag")
    found = audio_speech.SpeechFeatures(folder, str(device))
    if found.tag != tag:
        raise CodecError(f"--audio-encoder {folder}: is {found.tag!r}: expected {tag!r}")
    return found


def audio_encoder_in(folder: Path | None, device: str = "cpu") -> AudioEncoder:
    """The pretrained encoder of a folder, or the features that need no weights; CodecError for another folder."""
    return audio_logmel.LogMelAudio() if folder is None else audio_speech.SpeechFeatures(folder, device)


def text_encoder(tag: str, folder: Path, device: str | torch.device = "cpu") -> TextEncoder:
    """The text encoder of a tag on `device`, from `folder`.

    Raises CodecError for an unknown tag and for a folder with another model.
    """
    if tag.partition("-")[0] != text_umt5.KIND:
        raise CodecError(f"text encoder {tag!r}: unknown; expected that of a {text_umt5.KIND} model")
    found = text_umt5.Umt5Text(folder, device)
    if found.tag != tag:
        raise CodecError(f"--text-encoder {folder}: is {found.tag!r}: expected {tag!r}")
    return found


def text_encoder_in(folder: Path, device: str | torch.device = "cpu") -> TextEncoder:
    """The pretrained text encoder of a folder on `device`; CodecError for another folder."""
    return text_umt5.Umt5Text(folder, device)


def text_encoder_named(folder: Path) -> tuple[str, int]:
    """(tag, width) of the text encoder of a folder, which is not loaded; CodecError for another folder."""
    return text_umt5.identify(folder)


def motion_encoder(
    tag: str, face_landmarker: Path | None, motion_extractor: Path | None = None, device: str = "cpu"
) -> MotionEncoder:
    """The motion encoder of a tag, with the model file it needs; a network runs on `device`.

    Raises CodecError for a tag whose motion cannot be computed from pictures (a rendered clip's sidecar has it), when
    the model file is not given or not there, or when it holds another model.
    """
    if tag.partition("-")[0] == motion_liveportrait.KIND:
        if motion_extractor is None:
            raise CodecError(
                f"motion {tag!r}: needs --motion-extractor FILE, the LivePortrait checkpoint with this tag"
            )
        found = motion_liveportrait.LivePortraitMotion(motion_extractor, device)
        if found.tag != tag:
            raise CodecError(f"--motion-extractor {motion_extractor}: is {found.tag!r}: expected {tag!r}")
        return found
    if motion_extractor is not None:
        raise CodecError(f"--motion-extractor {motion_extractor}: not used: expected none, as the motion is {tag!r}")
    if tag != motion_landmarker.TAG:
        raise CodecError(
            f"motion {tag!r}: no encoder computes it from pictures; expected a motion file with this tag, or motion of "
            f"tag {motion_landmarker.TAG!r} or of a {motion_liveportrait.KIND} model"
        )
    if face_landmarker is None:
        raise CodecError(f"motion {tag!r}: needs --face-landmarker FILE (MediaPipe's face_landmarker.task)")
    return motion_landmarker.LandmarkerMotion(face_landmarker)


def motion_encoder_in(face_landmarker: Path, motion_extractor: Path | None) -> MotionEncoder:
    """LivePortrait's encoder if there is its checkpoint, else MediaPipe's; CodecError for another file."""
    if motion_extractor is not None:
        return motion_liveportrait.LivePortraitMotion(motion_extractor)
    return motion_landmarker.LandmarkerMotion(face_landmarker)


def flame_encoder(checkpoint: Path, tag: str | None = None, device: str = "cpu") -> FlameEncoder:
    """The FLAME encoder of a checkpoint, on `device`. Raises CodecError for another file, and for one without this
    tag if given."""
    found = flame_deca.DecaFlame(checkpoint, device)
    if tag not in (None, found.tag):
        raise CodecError(f"--flame-encoder {checkpoint}: is {found.tag!r}: expected {tag!r}")
    return found


def face_finder(
    detector: Path | None, landmarker: Path | None, device: str = "cpu", tag: str | None = None
) -> FaceFinder:
    """insightface's detector on `device` if there is one, else MediaPipe's landmarker. Raises CodecError without
    either, for another file, and for a finder without this `tag` if given."""
    if detector is None and landmarker is None:
        raise CodecError("no face finder: expected --face-landmarker FILE or --face-detector DIR")
    found: FaceFinder
    if detector is not None:
        found = RetinaFaceModel(detector, device)
    else:
        assert landmarker is not None
        found = FaceLandmarkerModel(landmarker, video=False, max_faces=2)
    if tag not in (None, found.tag):
        raise CodecError(f"--face-detector {detector}: is {found.tag!r}: expected {tag!r}")
    return found
