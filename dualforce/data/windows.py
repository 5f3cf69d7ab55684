"""Audio windows: the 8 feature frames of a latent frame with real context on both sides.

Legend: F latent frames, A = 8 audio frames (50 Hz) per latent frame, c context frames, Ca width of the features.
Index algebra: slot a of latent frame j is feature frame max(0, 8j - 6 + a), so F latent frames hold 2 + 8 (F - 1).
"""

from __future__ import annotations

from torch import Tensor

from dualforce.types import AUDIO_FRAMES, FrameSpan, audio_frames_of


def flat_track(audio: Tensor) -> Tensor:
    """[F,A,Ca] on the latent clock -> [2 + 8(F-1), Ca] at 50 Hz, without the repetition in frame 0."""
    if audio.ndim != 3 or audio.shape[0] < 1 or audio.shape[1] != AUDIO_FRAMES:
        raise ValueError(f"audio of shape {list(audio.shape)}: expected [F,{AUDIO_FRAMES},Ca]")
    return audio.flatten(0, 1)[AUDIO_FRAMES - 2 :]


def audio_windows(audio: Tensor, frames: int, context: int) -> Tensor:
    """[F_all,A,Ca] -> [frames, A+2c, Ca], same dtype: windows of the first `frames` latent frames.

    The context of the last window comes from beyond the crop where the clip goes on (F_all > frames); at the ends of
    the clip the outermost feature frame is repeated. Raises ValueError for a shape off the clock, frames outside
    1..F_all, or a negative context.
    """
    if not 1 <= frames <= audio.shape[0] or context < 0:
        raise ValueError(
            f"frames {frames}, context {context}: expected 1 to {audio.shape[0]} frames and a context of at least 0"
        )
    track = flat_track(audio)
    index = audio_frames_of(FrameSpan(0, frames), context).clamp_max(len(track) - 1)
    return track[index.to(audio.device)]
