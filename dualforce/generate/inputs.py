"""What a user hands in (image, sound, motion, text), turned into what the model reads.

Everything goes through the extractors that the model's folder names and is normalised with its statistics; another tag
is refused, never converted. Legend as in `rollout`; P pixel frames at 25 a second.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dualforce.codecs.face_box import face_squares, resize, square_crop
from dualforce.codecs.face_landmarker import FaceLandmarkerModel
from dualforce.codecs.media import read_audio, read_image
from dualforce.codecs.motion_landmarker import CROP_SIZE, NoFaceError
from dualforce.codecs.motion_sidecar import Motion, read_motion
from dualforce.codecs.protocols import VIDEO_STRIDE, AudioEncoder, Pixels, VideoCodec, Wave
from dualforce.codecs.registry import audio_encoder, motion_encoder, text_encoder, video_codec
from dualforce.codecs.text_umt5 import padded
from dualforce.config import ModelConfig
from dualforce.data.statistics import StreamStatistics
from dualforce.generate.rollout import RolloutInputs
from dualforce.types import (
    FPS,
    PIXEL_FRAMES_PER_LATENT,
    SAMPLE_RATE,
    SAMPLES_PER_FRAME,
    STRUCT_TOKENS,
    FrameSpan,
    audio_frames_of,
    struct_pixels,
)

logger = logging.getLogger(__name__)


class GenerateError(ValueError):
    """Something handed in cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class Sources:
    """The files a video is generated from, and how much of the sound is used (None: all of it). `text` is a file with
    an embedding, `prompt` a text in words, of which `text_encoder` makes one. `size`: edge of the pictures in pixels
    (None: that of the first shard set that the model was trained on)."""

    image: Path
    audio: Path
    motion: Path | None = None
    text: Path | None = None
    face_landmarker: Path | None = None
    seconds: float | None = None
    audio_encoder: Path | None = None
    motion_extractor: Path | None = None
    video_codec: Path | None = None
    prompt: str | None = None
    text_encoder: Path | None = None
    size: int | None = None


@dataclass(frozen=True)
class Prepared:
    """Rollout inputs, and what is needed to write the result: P pictures with the sound [640 P] at 16 kHz."""

    inputs: RolloutInputs
    statistics: StreamStatistics
    codec: VideoCodec
    pixel_frames: int
    wave: Wave


def prepare(
    sources: Sources, config: Mapping[str, Any], model: ModelConfig, origin: str, device: str | torch.device = "cpu"
) -> Prepared:
    """Read and code all inputs for a model folder's `config`. `origin` names the folder in errors; pretrained networks
    run on `device`.

    Raises GenerateError, MediaError, SidecarError or CodecError, each with one line.
    """
    statistics = StreamStatistics.from_manifest(config, origin)
    if sources.face_landmarker is not None and not sources.face_landmarker.is_file():
        raise GenerateError(f"--face-landmarker {sources.face_landmarker}: no such file")
    extractors = config["extractors"]
    codec = video_codec(extractors["video"]["tag"], sources.video_codec, device)
    size = _pixel_size(config["geometry"], sources.size, codec, origin)
    wave, count = _sound(sources.audio, sources.seconds)
    frames = whole_frames(count, model.frames_per_chunk)
    face = _face(sources.image, size, sources.face_landmarker)
    picture = face(size)
    # Motion is read from a picture of the edge that the shard builder reads it from: blendshapes depend on it.
    motion = _motion(sources, extractors["motion"], face, max(size, CROP_SIZE), count, device)
    given = len(motion) > 1
    inputs = RolloutInputs(
        reference=statistics.normalise_reference(codec.encode_image(picture)),
        first_motion=statistics.normalise_struct(motion[:1]).expand(STRUCT_TOKENS, -1),
        audio=statistics.normalise_audio(
            _audio(
                wave,
                audio_encoder(extractors["audio"]["tag"], sources.audio_encoder, device),
                frames,
                model.audio.context,
            )
        ),
        text=_text(sources, extractors, model, device),
        struct=statistics.normalise_struct(_on_clock(motion, frames)) if given else None,
    )
    _check_widths(inputs, model, origin)
    return Prepared(inputs, statistics, codec, count, wave[: count * SAMPLES_PER_FRAME])


def whole_frames(pixel_frames: int, frames_per_chunk: int) -> int:
    """Latent frames of whole chunks [1, n, n, ...] that hold at least `pixel_frames` pixel frames."""
    per_chunk = PIXEL_FRAMES_PER_LATENT * frames_per_chunk
    return 1 + frames_per_chunk * -(-(pixel_frames - 1) // per_chunk)


def read_text(path: Path, model: ModelConfig) -> Tensor:
    """The text embedding [E,Ct] fp32 of a safetensors file with the tensor "text". Raises GenerateError."""
    if not (model.video.text or model.struct.text):
        raise GenerateError(f"--text-embedding {path}: this model was built without text attention: expected no text")
    if not path.is_file():
        raise GenerateError(f"--text-embedding {path}: no such file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = sorted(file.keys())
            if "text" not in names:
                raise GenerateError(f"--text-embedding {path}: tensors {names}: expected one called 'text'")
            text: Tensor = file.get_tensor("text").float()
    except (SafetensorError, OSError) as error:
        raise GenerateError(f"--text-embedding {path}: cannot be read as safetensors ({error})") from None
    width = model.video.text_dim
    if text.dim() != 2 or not len(text) or text.shape[1] != width or not torch.isfinite(text).all():
        raise GenerateError(f"--text-embedding {path}: text of shape {list(text.shape)}: expected finite [E,{width}]")
    return text


def _text(
    sources: Sources, extractors: Mapping[str, Any], model: ModelConfig, device: str | torch.device
) -> Tensor | None:
    """The text [E,Ct] fp32, from the file or of the words that were given; None without either."""
    if sources.prompt is None:
        if sources.text_encoder is not None:
            raise GenerateError(f"--text-encoder {sources.text_encoder}: not used: expected --text TEXT with it")
        return None if sources.text is None else read_text(sources.text, model)
    if sources.text is not None:
        raise GenerateError("--text and --text-embedding: expected one of them")
    if not sources.prompt.strip():
        raise GenerateError(f"--text {sources.prompt!r}: expected words")
    if "text" not in extractors or not (model.video.text or model.struct.text):
        raise GenerateError("--text: this model was trained without texts: expected none")
    tag = extractors["text"]["tag"]
    if sources.text_encoder is None:
        raise GenerateError(f"--text: needs --text-encoder DIR, the folder of the model {tag!r}")
    embedding = padded(text_encoder(tag, sources.text_encoder, device).encode(sources.prompt))
    # Rounded as texts of shards are.
    return embedding.half().float()


def _pixel_size(geometry: Mapping[str, Any], wanted: int | None, codec: VideoCodec, origin: str) -> int:
    """Edge of the pictures: the model's, or `wanted`, if it was trained at that size too. GenerateError otherwise, and
    when the model's does not fit its latents."""
    size, latent = geometry.get("pixel_size"), geometry.get("latent")
    if not isinstance(size, int) or size < 1:
        raise GenerateError(f"{origin}: geometry.pixel_size = {size!r}: expected a number of pixels")
    expected = [codec.channels, size // VIDEO_STRIDE, size // VIDEO_STRIDE]
    if latent != expected:
        raise GenerateError(f"{origin}: geometry.latent = {latent}: expected {expected} for pixel_size = {size}")
    known = [size, *(edge for edge, _ in trained_buckets(geometry, origin))]
    if wanted is not None and wanted not in known:
        names = " or ".join(map(str, sorted(set(known))))
        raise GenerateError(f"--size {wanted}: expected {names}, what {origin} says it was trained at")
    return wanted or size


def trained_buckets(geometry: Mapping[str, Any], origin: str) -> list[tuple[int, int]]:
    """(edge of the pictures in pixels, latent frames of the training clips) of every bucket that a config.json names;
    none in one of an earlier version. Raises GenerateError for anything else."""
    found, buckets = [], geometry.get("buckets", [])
    if not isinstance(buckets, list):
        raise GenerateError(f"{origin}: geometry.buckets: {buckets!r}: expected a list")
    for bucket in buckets:
        try:
            edge, frames = int(bucket["pixel_size"]), int(bucket["frames"])
        except (KeyError, TypeError, ValueError):
            raise GenerateError(
                f"{origin}: geometry.buckets: {bucket!r}: expected pixel_size and frames, both numbers"
            ) from None
        found.append((edge, frames))
    return found


def _sound(path: Path, seconds: float | None) -> tuple[Wave, int]:
    """(the sound cut to whole pixel frames, pixel frames to generate)."""
    wave = read_audio(path)
    if not np.isfinite(wave).all():
        raise GenerateError(f"--audio {path}: contains NaN or infinity: expected finite samples")
    available = len(wave) // SAMPLES_PER_FRAME
    if not available:
        raise GenerateError(f"--audio {path}: {len(wave) / SAMPLE_RATE:.3f} s of sound: expected at least {1 / FPS} s")
    wanted = available if seconds is None else seconds * FPS
    count = round(wanted) if math.isfinite(wanted) else 0
    if not 1 <= count <= available:
        raise GenerateError(
            f"--seconds {seconds}: expected {1 / FPS} to {available / FPS:g}, the length of {path} in whole frames"
        )
    return wave[: available * SAMPLES_PER_FRAME], count


def _audio(wave: Wave, encoder: AudioEncoder, frames: int, context: int) -> Tensor:
    """Windows [F,A+2c,Ca]; sound beyond the generated part is used where it exists, then the last frame repeats."""
    features = encoder.encode(wave)
    return features[audio_frames_of(FrameSpan(0, frames), context).clamp_max(len(features) - 1)]


def _face(path: Path, size: int, face_landmarker: Path | None) -> Callable[[int], Pixels]:
    """The reference picture at any edge: as it is at the model's size, else the face crop as of training clips."""
    picture = read_image(path)
    height, width = picture.shape[:2]
    if height == width == size:
        logger.info("%s: used as it is (%d x %d)", path, width, height)
        return partial(resize, picture)
    if face_landmarker is not None:
        return _cropped(path, picture, face_landmarker)
    if height != width:
        raise GenerateError(
            f"--image {path}: {width} x {height} pixels: expected a square picture, or --face-landmarker FILE to find "
            "the face in it"
        )
    logger.info("%s: square, resized from %d to %d pixels without looking for the face", path, width, size)
    return partial(resize, picture)


def _cropped(path: Path, picture: Pixels, face_landmarker: Path) -> Callable[[int], Pixels]:
    with FaceLandmarkerModel(face_landmarker, video=False, max_faces=4) as landmarker:
        faces = landmarker.faces(picture)
    if not faces:
        raise GenerateError(f"--image {path}: no face found: expected a picture of a face")
    if len(faces) > 1:
        logger.warning("%s: %d faces, the largest is used", path, len(faces))
    square = face_squares(faces[0].box[None])[0]
    logger.info("%s: cropped to the face, a square of %.0f pixels around (%.0f, %.0f)", path, square[2], *square[:2])
    return partial(square_crop, picture, square)


def _motion(
    sources: Sources, extractor: Mapping[str, Any], face: Callable[[int], Pixels], edge: int, count: int,
    device: str | torch.device,
) -> Tensor:  # fmt: skip
    """Motion [1,Cs] of frame 0, or [P,Cs] of the whole clip when a motion file has more than one row."""
    tag = extractor["tag"]
    if sources.motion is not None:
        if sources.motion_extractor is not None:
            raise GenerateError(
                f"--motion-extractor {sources.motion_extractor}: not used: expected none, as --motion gives the motion"
            )
        return _given_motion(sources.motion, read_motion(sources.motion), extractor, count)
    encoder = motion_encoder(tag, sources.face_landmarker, sources.motion_extractor, str(device))
    try:
        return encoder.encode(face(edge)[None], FPS)
    except NoFaceError:
        raise GenerateError(
            f"--image {sources.image}: no face found in its crop: expected a picture of a face"
        ) from None


def _given_motion(path: Path, motion: Motion, extractor: Mapping[str, Any], count: int) -> Tensor:
    if motion.tag != extractor["tag"]:
        raise GenerateError(f"--motion {path}: motion.tag = {motion.tag!r}: expected {extractor['tag']!r}, the model's")
    names = tuple(extractor.get("names", motion.names))
    if motion.names != names:
        raise GenerateError(
            f"--motion {path}: motion.names = {list(motion.names)}: expected {list(names)}, the model's"
        )
    rows = len(motion.values)
    if rows > 1 and rows < count:
        raise GenerateError(
            f"--motion {path}: {rows} rows: expected 1 (motion of frame 0), or at least {count} pixel frames"
        )
    return motion.values[:count]


def _on_clock(motion: Tensor, frames: int) -> Tensor:
    """[P,Cs] -> [F,Q,Cs]; frames that are generated only to be trimmed repeat the last row."""
    return motion[struct_pixels(FrameSpan(0, frames)).clamp_max(len(motion) - 1)]


def _check_widths(inputs: RolloutInputs, model: ModelConfig, origin: str) -> None:
    found = {"motion": inputs.first_motion.shape[-1], "audio": inputs.audio.shape[-1]}
    for name, expected in (("motion", model.struct.in_dim), ("audio", model.audio.dim)):
        if found[name] != expected:
            raise GenerateError(
                f"{origin}: {name} of width {found[name]}: expected {expected}, as the model's config says"
            )
