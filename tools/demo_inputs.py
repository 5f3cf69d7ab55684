"""What drives a demo's video: face, sound and first motion of a held-out clip, in files as a user would bring them."""

from __future__ import annotations

import json
import struct
import wave
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_shards.reader import ShardSet
from data_shards.schema import ClipSample
from dualforce.codecs import motion_landmarker
from dualforce.codecs.face_box import Pixels, square_crop
from dualforce.codecs.media import read_video
from dualforce.codecs.motion_sidecar import FORMAT, VERSION, find_sidecar, read_motion
from dualforce.types import SAMPLE_RATE, pixel_frames


class InputError(ValueError):
    """No clip can drive the demo's video; one line for the user."""


def write_driving_inputs(shards: Path, videos: Path, folder: Path, landmarker: Path | None) -> list[str]:
    """Write `image.png`, `audio.wav` and, where motion comes from sidecars, `motion.json` of the first held-out clip
    (the first training clip where nothing is held out); returns the options of `dualforce generate` that name them.

    Raises InputError, MediaError or SidecarError.
    """
    opened = ShardSet.open(shards)
    held_out = opened.split("validation")
    sample = (held_out if len(held_out) else opened.split("train")).read(0)
    video, start = videos / sample.meta["source"], int(sample.meta["first_pixel_frame"])
    span = read_video(video, start=start, stop=start + pixel_frames(sample.frames))
    if span.sound is None:
        raise InputError(f"{video}: no sound, though a clip was made of it; expected the file that was there before")
    image, audio = folder / "image.png", folder / "audio.wav"
    image.write_bytes(png(crop(span.frames[0], sample, opened.manifest["pixel_size"])))
    write_wav(audio, span.sound.wave[:])
    options = ["--image", str(image), "--audio", str(audio)]
    if opened.manifest["extractors"]["motion"]["tag"] == motion_landmarker.TAG:
        return [*options, *(["--face-landmarker", str(landmarker)] if landmarker else [])]
    return [*options, "--motion", str(write_motion(folder / "motion.json", video, start))]


def crop(picture: Pixels, sample: ClipSample, size: int) -> Pixels:
    """The square [size,size,3] that the clip's first frame was cut from `picture`."""
    x0, y0, x1, y1 = sample.meta["crop"]["boxes"][0]
    return square_crop(picture, np.array([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0]), size)


def write_motion(path: Path, video: Path, frame: int) -> Path:
    """A motion file with the one row that the sidecar of `video` has for pixel frame `frame`."""
    sidecar = find_sidecar(video)
    if sidecar is None:
        raise InputError(f"{video}: no sidecar beside it: expected the one that the shards were built with")
    motion = read_motion(sidecar)
    values = {"tag": motion.tag, "names": list(motion.names), "values": [motion.values[frame].tolist()]}
    path.write_text(json.dumps({"format": FORMAT, "version": VERSION, "motion": values}) + "\n", encoding="utf-8")
    return path


def write_wav(path: Path, sound: NDArray[np.float32]) -> None:
    """Sound [N] in [-1, 1] at 16 kHz as 16-bit mono."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((sound.clip(-1, 1) * 32767).round().astype("<i2").tobytes())


def png(picture: Pixels) -> bytes:
    """A picture [H,W,3] uint8 as a PNG file (8-bit RGB, one filter-less block; PNG specification, third edition)."""
    height, width, _ = picture.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), picture.reshape(height, -1)], axis=1)
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0),
        b"IDAT": zlib.compress(rows.tobytes()),
        b"IEND": b"",
    }
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
