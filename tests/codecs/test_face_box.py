"""Cutting out and resizing the square crop."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.clips import textured

from dualforce.codecs.face_box import face_squares, resize, square_boxes, square_crop


def test_the_square_holds_the_face_at_half_its_size() -> None:
    boxes = np.array([[40.0, 50.0, 80.0, 110.0], [0.0, 0.0, 60.0, 30.0]])
    squares = face_squares(boxes)
    assert squares[:, 2].tolist() == [120, 120]
    outer = square_boxes(squares)
    assert (outer[:, :2] < boxes[:, :2]).all() and (outer[:, 2:] > boxes[:, 2:]).all()
    assert (squares[:, 1] < boxes[:, 1::2].mean(axis=1)).all()  # room for hair above


def test_a_whole_pixel_crop_is_a_slice() -> None:
    picture = textured(1, 96)[0]
    crop = square_crop(picture, np.array([40.0, 50.0, 32.0]), 32)
    assert np.array_equal(crop, picture[34:66, 24:56])
    assert resize(picture, 96) is picture


def test_outside_the_picture_its_edge_is_repeated() -> None:
    picture = textured(1, 64)[0]
    crop = square_crop(picture, np.array([0.0, 32.0, 64.0]), 64)
    assert np.array_equal(crop[:, 32:], picture[:, :32])
    assert np.array_equal(crop[:, :32], np.repeat(picture[:, :1], 32, axis=1))
    far = square_crop(picture, np.array([-500.0, -500.0, 40.0]), 16)
    assert np.array_equal(far, np.broadcast_to(picture[0, 0], (16, 16, 3)))


@pytest.mark.parametrize("side", [13.7, 40.0, 64.0, 160.3])
def test_a_ramp_keeps_its_place(side: float) -> None:
    """A linear ramp through any resize stays the same ramp: no shift, no change of contrast."""
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3)).copy()
    crop = square_crop(ramp, np.array([120.25, 128.0, side]), 32)
    expected = 120.25 - side / 2 + (np.arange(32) + 0.5) * side / 32 - 0.5
    assert np.abs(crop[16, :, 0] - expected).max() <= 0.51


def test_shrinking_averages() -> None:
    """A fine chequerboard becomes grey, not a pattern: the filter is wide enough."""
    board = ((np.indices((256, 256)).sum(axis=0) % 2) * 255).astype(np.uint8)
    small = resize(np.repeat(board[:, :, None], 3, axis=2), 32)
    assert np.abs(small.astype(int) - 128).max() <= 2


def test_a_square_needs_a_side() -> None:
    with pytest.raises(ValueError, match="more than 0"):
        square_crop(textured(1, 16)[0], np.array([8.0, 8.0, 0.0]), 8)
