"""The checks between the stages: is this footage fit for training? Every refusal has a reason code, with the figure
and what was expected; the figures of what passes go to the samples' metadata."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from dualforce.codecs.media_clock import PlacedSound
from dualforce.codecs.protocols import Pixels, Samples, Wave
from dualforce.preprocess.face_track import FaceTrack
from dualforce.preprocess.reasons import Reason, Rejected
from dualforce.preprocess.scenes import Scene
from dualforce.preprocess.sharpness import sharpness
from dualforce.preprocess.windows import LENGTH
from dualforce.types import FPS, SAMPLE_RATE

FULL_SCALE = 0.9  # sound from here on counts as cut off: a lossy codec wears flat tops down, or overshoots
BLOCK = 2**20  # samples of a long sound that are looked at together: 66 s
UNJUDGED = ("speech_share", "sharpness", "yaw_rate")  # what is not asked of rendered clips by default


@dataclass(frozen=True)
class Limits:
    """What is asked of a video. Sizes are relative to the crop: a face box takes half of it (face_box.FACE_SHARE).

    `judge_rendered`: ask for speech, sharpness and yaw of clips with sidecars too. These have a synthesised sound and
    drawn faces, for which those limits are not made.
    """

    seconds: float = LENGTH / FPS  # a scene's length; never less than one window
    face_rate: float = 0.95  # share of a scene's tracked frames with a face
    face_share: float = 0.25  # longer side of the median face box over the crop's size: at most doubled in size
    rival_rate: float = 0.05  # at most: share of a scene's tracked frames with another large face
    yaw_degrees: float = 40.0  # a head turned further than this, to either side,
    yaw_rate: float = 0.1  # in at most this share of a window's tracked frames
    sharpness: float = 0.5  # of the face, median over a window (sharpness.py)
    clip_rms: float = 1e-3  # -60 dB of full scale, over the video
    window_rms: float = 1e-4  # -80 dB, in each window
    clipped_share: float = 0.02  # at most: share of a window's sound near full scale (from 0.9)
    speech_share: float = 0.5  # share of a window in which somebody speaks
    judge_rendered: bool = False

    def for_rendered(self) -> Limits:
        """These limits for a clip with a sidecar."""
        return self if self.judge_rendered else replace(self, speech_share=0.0, sharpness=0.0, yaw_rate=1.0)


def check_sound(sound: PlacedSound | None, limits: Limits) -> tuple[PlacedSound, float]:
    """The sound and its RMS, if there is any to be heard; raises Rejected (R_NOAUDIO, R_SILENT, E_NONFINITE)."""
    if sound is None or not len(sound.wave):
        raise Rejected(Reason.R_NOAUDIO, "no sound stream")
    if not all(np.isfinite(block).all() for block in _blocks(sound.wave)):
        raise Rejected(Reason.E_NONFINITE, "the decoded sound holds NaN or infinity")
    return sound, _check_loudness(sound.wave, limits.clip_rms)


def check_window_sound(wave: Wave, limits: Limits) -> dict[str, float]:
    """Loudness and clipping of a window's sound; raises Rejected (R_SILENT, R_CLIPPED)."""
    level = _check_loudness(wave, limits.window_rms)
    clipped = float((np.abs(wave) >= FULL_SCALE).mean())
    if clipped > limits.clipped_share:
        detail = f"{clipped:.1%} of the sound at or near full scale: expected at most {limits.clipped_share:.1%}"
        raise Rejected(Reason.R_CLIPPED, detail)
    return {"window_rms": round(level, 5), "clipped_share": round(clipped, 5)}


def check_speech(share: float, limits: Limits) -> dict[str, float]:
    """The share of a window in which somebody speaks; raises Rejected (R_NOSPEECH)."""
    if share < limits.speech_share:
        detail = f"speech in {share:.0%} of the window: expected at least {limits.speech_share:.0%}"
        raise Rejected(Reason.R_NOSPEECH, detail)
    return {"speech_share": round(share, 4)}


def check_length(scene: Scene, limits: Limits, among: str = "") -> None:
    """Raise Rejected (R_SHORT) for a scene that is too short; `among` says which of several it is."""
    least = max(LENGTH, round(limits.seconds * FPS))
    if scene.length < least:
        raise Rejected(Reason.R_SHORT, f"{scene.length} pixel frames{among}: expected at least {least}")


def check_faces(track: FaceTrack, size: int, limits: Limits) -> None:
    """Raise Rejected (R_NOFACE, R_SMALLFACE, R_MULTIFACE) unless one large face is there all the time."""
    if not track.found.any() or _face_rate(track) < limits.face_rate:
        detail = f"a face in {_face_rate(track):.0%} of {len(track.times)} tracked frames"
        raise Rejected(Reason.R_NOFACE, f"{detail}: expected at least {limits.face_rate:.0%}")
    if face_side(track) < limits.face_share * size:
        wanted = f"at least {limits.face_share * size:.0f} for crops of {size}"
        raise Rejected(Reason.R_SMALLFACE, f"face of {face_side(track):.0f} pixels: expected {wanted}")
    if track.rivals.mean() > limits.rival_rate:
        detail = f"a second large face in {track.rivals.mean():.0%} of the tracked frames"
        raise Rejected(Reason.R_MULTIFACE, f"{detail}: expected at most {limits.rival_rate:.0%}")


def check_yaw(track: FaceTrack, limits: Limits) -> dict[str, float]:
    """How far the head is turned in a window; raises Rejected (R_YAW). Nothing where it is not known."""
    turned = np.abs(track.yaw[np.isfinite(track.yaw)])
    if not len(turned):
        return {}
    share = float((turned > limits.yaw_degrees).mean())
    if share > limits.yaw_rate:
        detail = (
            f"head turned by more than {limits.yaw_degrees:g} degrees in {share:.0%} of {len(turned)} tracked frames"
        )
        raise Rejected(Reason.R_YAW, f"{detail}, up to {turned.max():.0f}: expected at most {limits.yaw_rate:.0%}")
    return {"yaw_degrees": round(float(turned.max()), 1), "yaw_rate": round(share, 4)}


def check_sharpness(crops: Pixels, limits: Limits) -> dict[str, float]:
    """Sharpness of the face in a window's crops [P,S,S,3] uint8; raises Rejected (R_BLUR). Nothing when the crops are
    too small for it and no sharpness is asked for."""
    found = sharpness(crops)
    if found is None and limits.sharpness > 0:
        raise ValueError(f"crops of {crops.shape[1]}: too small to judge their sharpness")
    if found is None:
        return {}
    if found < limits.sharpness:
        raise Rejected(Reason.R_BLUR, f"sharpness {found:.2f} of the face: expected at least {limits.sharpness:.2f}")
    return {"sharpness": round(found, 4)}


def report(track: FaceTrack, sound: PlacedSound, level: float) -> dict[str, float]:
    """The figures of a scene and of the video's sound, whose RMS is `level`, for the sample's metadata."""
    return {
        "face_rate": round(_face_rate(track), 4),
        "face_pixels": round(face_side(track), 1),
        "rival_rate": round(float(track.rivals.mean()), 4),
        "rms": round(level, 5),
        "sound_minus_video_s": round(len(sound.wave) / SAMPLE_RATE - track.frames / FPS, 3),
        "sound_start_s": round(sound.start, 4),
        "sound_holes_s": round(sound.gap, 4),
    }


def face_side(track: FaceTrack) -> float:
    """Longer side of the median face box, in source pixels."""
    boxes = track.boxes[track.found]
    return float(np.median((boxes[:, 2:] - boxes[:, :2]).max(axis=1)))


def rms(wave: Samples) -> float:
    """Root mean square; 0 for an empty wave."""
    squares = sum(float(np.square(block, dtype=np.float64).sum()) for block in _blocks(wave))
    return float(np.sqrt(squares / len(wave))) if len(wave) else 0.0


def _blocks(wave: Samples) -> Iterator[Wave]:
    return (wave[first : first + BLOCK] for first in range(0, len(wave), BLOCK))


def _check_loudness(wave: Samples, least: float) -> float:
    """RMS of a wave; raises Rejected (R_SILENT) below `least`."""
    level = rms(wave)
    if level < least:
        raise Rejected(Reason.R_SILENT, f"RMS {level:.2g} of full scale: expected at least {least:.2g}")
    return level


def _face_rate(track: FaceTrack) -> float:
    return float(track.found.mean()) if len(track.times) else 0.0
