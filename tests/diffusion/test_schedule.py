"""Noise-level schedules (model reference 5.1 and 5.3)."""

from __future__ import annotations

import pytest
import torch

from dualforce.diffusion.schedule import fixed_levels, joint_levels, shift


@pytest.mark.parametrize("s", [0.5, 1.0, 3.0, 5.0])
def test_shift(s: float) -> None:
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    sigma = shift(u, s)
    assert sigma[0] == 0 and sigma[-1] == 1 and (sigma.diff() > 0).all()
    torch.testing.assert_close(shift(sigma, 1 / s), u)  # 1/s undoes s
    assert float(shift(0.5, s)) == pytest.approx(s / (s + 1))  # the median
    if s != 1:
        assert ((sigma[1:-1] > u[1:-1]) == (s > 1)).all()


def test_movas_table_at_shift_five() -> None:
    """1000 steps from 1 to 0.003/1.002: from 1.0 to 0.0148, 358 of them at t >= 900."""
    sigma = shift(torch.linspace(1.0, 0.003 / 1.002, 1000, dtype=torch.float64), 5.0)
    assert sigma[0] == 1 and float(sigma[-1]) == pytest.approx(0.0148, abs=5e-5)
    assert int((1000 * sigma >= 900).sum()) == 358


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_structure_leads(steps: int) -> None:
    video, struct = joint_levels(steps, 3.0, 0.5)
    for levels in (video, struct):
        assert levels.shape == (steps + 1,) and levels.dtype == torch.float64
        assert levels[0] == 1 and levels[-1] == 0 and (levels.diff() < 0).all()
    assert (struct[1:-1] < video[1:-1]).all()


def test_both_streams_are_on_one_grid() -> None:
    video, struct = joint_levels(8, 3.0, 0.5)
    torch.testing.assert_close(shift(video, 1 / 3.0), shift(struct, 1 / 0.5))


def test_no_steps() -> None:
    with pytest.raises(ValueError, match="steps = 0: expected at least 1"):
        joint_levels(0, 3.0, 0.5)


def test_fixed_levels_are_midpoints() -> None:
    assert fixed_levels(4).tolist() == [0.125, 0.375, 0.625, 0.875]
    assert fixed_levels(10).dtype == torch.float64
