"""Stage 3: is this footage fit for training? Every refusal has a reason code."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dualforce.codecs.media_clock import PlacedSound, Wave
from dualforce.preprocess.face_track import FaceTrack
from dualforce.preprocess.reasons import Reason, Rejected
from dualforce.types import SAMPLE_RATE


@dataclass(frozen=True)
class Limits:
    """What is asked of a video. Sizes are relative to the crop: a face box takes half of it (face_box.FACE_SHARE)."""

    frames: int = 81  # pixel frames: one window
    face_rate: float = 0.95  # share of tracked frames with a face
    face_share: float = 0.25  # longer side of the median face box over the crop's size: at most doubled in size
    rival_rate: float = 0.05  # share of tracked frames with another large face
    clip_rms: float = 1e-3  # -60 dB of full scale, over the video
    window_rms: float = 1e-4  # -80 dB, in each window


def check_sound(sound: PlacedSound | None, limits: Limits) -> PlacedSound:
    """The sound, if there is any to be heard; raises Rejected (R_NOAUDIO, R_SILENT, E_NONFINITE)."""
    if sound is None or not len(sound.wave):
        raise Rejected(Reason.R_NOAUDIO, "no sound stream")
    if not np.isfinite(sound.wave).all():
        raise Rejected(Reason.E_NONFINITE, "the decoded sound holds NaN or infinity")
    check_loudness(sound.wave, limits.clip_rms)
    return sound


def check_loudness(wave: Wave, least: float) -> float:
    """RMS of a wave; raises Rejected (R_SILENT) below `least`."""
    level = rms(wave)
    if level < least:
        raise Rejected(Reason.R_SILENT, f"RMS {level:.2g} of full scale: expected at least {least:.2g}")
    return level


def check_faces(track: FaceTrack, size: int, limits: Limits) -> None:
    """Raise Rejected (R_SHORT, R_NOFACE, R_SMALLFACE, R_MULTIFACE) unless one large face is there all the time."""
    if track.frames < limits.frames:
        raise Rejected(Reason.R_SHORT, f"{track.frames} pixel frames: expected at least {limits.frames}")
    if _face_rate(track) < limits.face_rate:
        detail = f"a face in {_face_rate(track):.0%} of {len(track.times)} tracked frames"
        raise Rejected(Reason.R_NOFACE, f"{detail}: expected at least {limits.face_rate:.0%}")
    if face_side(track) < limits.face_share * size:
        wanted = f"at least {limits.face_share * size:.0f} for crops of {size}"
        raise Rejected(Reason.R_SMALLFACE, f"face of {face_side(track):.0f} pixels: expected {wanted}")
    if track.rivals.mean() > limits.rival_rate:
        detail = f"a second large face in {track.rivals.mean():.0%} of the tracked frames"
        raise Rejected(Reason.R_MULTIFACE, f"{detail}: expected at most {limits.rival_rate:.0%}")


def report(track: FaceTrack, sound: PlacedSound) -> dict[str, float]:
    """The measured figures, for the sample's metadata."""
    return {
        "face_rate": round(_face_rate(track), 4),
        "face_pixels": round(face_side(track), 1),
        "rival_rate": round(float(track.rivals.mean()), 4),
        "rms": round(rms(sound.wave), 5),
        "sound_minus_video_s": round(len(sound.wave) / SAMPLE_RATE - track.frames / 25, 3),
        "sound_start_s": round(sound.start, 4),
        "sound_holes_s": round(sound.gap, 4),
    }


def face_side(track: FaceTrack) -> float:
    """Longer side of the median face box, in source pixels."""
    boxes = track.boxes[track.found]
    return float(np.median((boxes[:, 2:] - boxes[:, :2]).max(axis=1)))


def rms(wave: Wave) -> float:
    """Root mean square; 0 for an empty wave."""
    return float(np.sqrt(np.mean(np.square(wave, dtype=np.float64)))) if len(wave) else 0.0


def _face_rate(track: FaceTrack) -> float:
    return float(track.found.mean())
