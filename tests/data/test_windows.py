"""Audio windows take their context from the real neighbours, also beyond the crop, and repeat at the clip's ends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dualforce.data.windows import audio_windows, flat_track
from dualforce.types import FrameSpan, audio_frames_of


def numbered(frames: int) -> Tensor:
    """A track on the latent clock whose value is the number of its 50 Hz frame, [F,8,1]."""
    return audio_frames_of(FrameSpan(0, frames)).float()[..., None]


@given(st.integers(1, 30))
def test_flat_track_has_every_frame_once(frames: int) -> None:
    assert flat_track(numbered(frames))[:, 0].tolist() == list(range(2 + 8 * (frames - 1)))


@given(st.integers(1, 20), st.integers(0, 10), st.integers(0, 4))
def test_windows_hold_consecutive_frames(frames: int, beyond: int, context: int) -> None:
    total = frames + beyond
    last = 2 + 8 * (total - 1) - 1
    windows = audio_windows(numbered(total), frames, context)[..., 0].tolist()
    expected = [[min(max(0, 8 * j - 6 + a), last) for a in range(-context, 8 + context)] for j in range(frames)]
    assert windows == expected


def test_the_crop_ends_with_real_context_and_the_clip_with_repetition() -> None:
    assert audio_windows(numbered(5), 3, 2)[-1, -3:, 0].tolist() == [17, 18, 19]
    assert audio_windows(numbered(3), 3, 2)[-1, -3:, 0].tolist() == [17, 17, 17]
    assert audio_windows(numbered(3), 3, 2)[0, :, 0].tolist() == [0] * 9 + [1, 2, 3]


def test_look_ahead_is_exactly_the_context() -> None:
    """Windows up to frame j change with 50 Hz frame 8j + 1 + c and with no later one."""
    for context in range(5):
        track = numbered(6)
        base = audio_windows(track, 6, context)
        for j in range(5):
            later = track.clone()
            later[audio_frames_of(FrameSpan(0, 6)) > 8 * j + 1 + context] = -1.0
            assert torch.equal(audio_windows(later, 6, context)[: j + 1], base[: j + 1])
            seen = track.clone()
            seen[audio_frames_of(FrameSpan(0, 6)) == 8 * j + 1 + context] = -1.0
            assert not torch.equal(audio_windows(seen, 6, context)[: j + 1], base[: j + 1])


@pytest.mark.parametrize(("shape", "frames", "context"), [((3, 8, 1), 4, 2), ((3, 8, 1), 0, 2), ((3, 8, 1), 1, -1)])
def test_impossible_windows(shape: tuple[int, ...], frames: int, context: int) -> None:
    with pytest.raises(ValueError, match=f"frames {frames}, context {context}"):
        audio_windows(torch.zeros(shape), frames, context)


def test_tracks_off_the_clock() -> None:
    with pytest.raises(ValueError, match=r"\[3, 7, 1\]: expected \[F,8,Ca\]"):
        flat_track(torch.zeros(3, 7, 1))
