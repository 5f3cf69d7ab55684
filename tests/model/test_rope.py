"""Rotary positions against formulas written out in float64 (model reference 2.6, 3 and 4.4)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dualforce.model.rope import Rotary, bridge_rotary, struct_rotary, video_rotary
from dualforce.types import FrameSpan

CPU = torch.device("cpu")
HEADS = [16, 32, 64, 128]


def as_complex(rotary: Rotary) -> Tensor:
    return torch.complex(rotary.cos, rotary.sin)


def turns(position: float, dim: int) -> list[complex]:
    """e^(i p 10000^(-2k/dim)) of the dim/2 pairs of one axis."""
    angles = [position * 10000.0 ** (-2 * pair / dim) for pair in range(dim // 2)]
    return [complex(math.cos(angle), math.sin(angle)) for angle in angles]


def close(rotary: Rotary, wanted: list[list[list[complex]]]) -> None:
    torch.testing.assert_close(as_complex(rotary), torch.tensor(wanted, dtype=torch.complex128), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("head", "split"), [(16, (8, 4, 4)), (32, (12, 10, 10)), (64, (24, 20, 20)), (128, (44, 42, 42))]
)
def test_video_positions(head: int, split: tuple[int, int, int]) -> None:
    height, width = 3, 2
    assert sum(split) == head
    wanted = [
        [turns(f, split[0]) + turns(y, split[1]) + turns(x, split[2]) for y in range(height) for x in range(width)]
        for f in range(5, 9)
    ]
    close(video_rotary(FrameSpan(5, 4), height, width, head, CPU, torch.float64), wanted)


@pytest.mark.parametrize("head", HEADS)
def test_struct_positions_are_pixel_frames(head: int) -> None:
    wanted = [[turns(max(0, 4 * j - 3 + q), head) for q in range(4)] for j in range(4)]
    close(struct_rotary(FrameSpan(0, 4), head, CPU, torch.float64), wanted)


@pytest.mark.parametrize("head", HEADS)
def test_bridge_positions_align_both_streams(head: int) -> None:
    video, struct = bridge_rotary(FrameSpan(0, 4), head, CPU, torch.float64)
    close(video, [[turns(0 if j == 0 else 4 * j - 1.5, head)] for j in range(4)])
    close(struct, [[turns(max(0, 4 * j - 3 + q), head) for q in range(4)] for j in range(4)])


def test_known_numbers() -> None:
    """Position 1: the first pair turns by 1 radian, the second of 16 dims by 10^(-1/2)."""
    rotary = struct_rotary(FrameSpan(1, 1), 16, CPU, torch.float64)
    assert rotary.cos[0, 0, :2].tolist() == pytest.approx([0.5403023058681398, 0.9504152802551828])
    assert rotary.sin[0, 0, :2].tolist() == pytest.approx([0.8414709848078965, 0.3109836124063396])


@pytest.mark.parametrize("offset", [1, 7, 4000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_positions_are_absolute(offset: int, dtype: torch.dtype) -> None:
    """A span further on is the slice of one from 0, bit for bit, and no table ends (Wan's own has 1024 rows)."""
    part, whole = FrameSpan(offset, 3), FrameSpan(0, offset + 3)
    pairs = [
        (video_rotary(part, 2, 3, 32, CPU, dtype), video_rotary(whole, 2, 3, 32, CPU, dtype)),
        (struct_rotary(part, 32, CPU, dtype), struct_rotary(whole, 32, CPU, dtype)),
        *zip(bridge_rotary(part, 32, CPU, dtype), bridge_rotary(whole, 32, CPU, dtype), strict=True),
    ]
    for short, long in pairs:
        assert torch.equal(short.cos, long.cos[offset:]) and torch.equal(short.sin, long.sin[offset:])
        assert not torch.equal(short.cos, long.cos[:3])


def test_angles_are_wide_even_for_a_narrow_model() -> None:
    """bf16 or fp32 angles would be off by radians at large positions: they come from float64."""
    span = FrameSpan(100_000, 1)
    rotary = struct_rotary(span, 16, CPU, torch.bfloat16)
    exact = struct_rotary(span, 16, CPU, torch.float64)
    assert rotary.cos.dtype == torch.float32
    torch.testing.assert_close(rotary.cos.double(), exact.cos, rtol=0, atol=1e-7)
