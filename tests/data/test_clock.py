"""The index algebra of the latent-frame clock (model reference, section 1), against definitions written out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualforce.types import (
    AUDIO_FRAMES,
    STRUCT_TOKENS,
    FrameSpan,
    audio_frames_of,
    chunk_of,
    latent_frames,
    latent_of_pixel,
    pixel_frames,
    struct_pixels,
)

frames = st.integers(1, 200)


@given(frames)
def test_lengths_are_inverse(count: int) -> None:
    pixels = pixel_frames(count)
    assert pixels == 1 + 4 * (count - 1)
    assert latent_frames(pixels) == count


@given(st.integers(-5, 800).filter(lambda p: p < 1 or p % 4 != 1))
def test_other_pixel_counts_are_refused(pixels: int) -> None:
    with pytest.raises(ValueError, match=str(pixels)):
        latent_frames(pixels)


@given(frames)
def test_every_pixel_frame_has_one_latent_frame(count: int) -> None:
    held = [[0]] + [[4 * j - 3, 4 * j - 2, 4 * j - 1, 4 * j] for j in range(1, count)]
    assert [p for group in held for p in group] == list(range(pixel_frames(count)))
    assert all(latent_of_pixel(p) == j for j, group in enumerate(held) for p in group)


@given(st.integers(0, 100), frames)
def test_structure_slots(start: int, length: int) -> None:
    table = struct_pixels(FrameSpan(start, length)).tolist()
    for j, row in zip(range(start, start + length), table, strict=True):
        assert len(row) == STRUCT_TOKENS
        assert row == ([0] * 4 if j == 0 else [4 * j - 3, 4 * j - 2, 4 * j - 1, 4 * j])


@given(st.integers(0, 100), frames, st.integers(0, 4))
def test_audio_slots(start: int, length: int, context: int) -> None:
    table = audio_frames_of(FrameSpan(start, length), context).tolist()
    for j, row in zip(range(start, start + length), table, strict=True):
        core = row[context : context + AUDIO_FRAMES]
        assert core == ([0] * 7 + [1] if j == 0 else list(range(8 * j - 6, 8 * j + 2)))
        assert row[:context] == [max(0, 8 * j - 6 - k) for k in range(context, 0, -1)]
        assert row[context + AUDIO_FRAMES :] == [8 * j + 1 + k for k in range(1, context + 1)]


@given(frames)
def test_audio_and_structure_cover_the_same_time(count: int) -> None:
    span = FrameSpan(0, count)
    assert sorted(set(struct_pixels(span).flatten().tolist())) == list(range(pixel_frames(count)))
    # two 50 Hz frames per pixel frame at 25 fps
    assert sorted(set(audio_frames_of(span).flatten().tolist())) == list(range(2 * pixel_frames(count)))


@given(st.integers(1, 8), st.integers(0, 10), st.integers(1, 8))
def test_padding_after_whole_chunks_starts_a_chunk_of_its_own(per_chunk: int, chunks: int, padding: int) -> None:
    real = 1 + chunks * per_chunk
    sizes = [[chunk_of(f, per_chunk) for f in range(real)].count(c) for c in range(chunks + 1)]
    assert sizes == [1] + [per_chunk] * chunks
    assert all(chunk_of(f, per_chunk) > chunk_of(real - 1, per_chunk) for f in range(real, real + padding))


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, 0)])
def test_empty_or_negative_spans_are_refused(start: int, length: int) -> None:
    with pytest.raises(ValueError, match="FrameSpan"):
        FrameSpan(start, length)
