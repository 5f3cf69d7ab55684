"""Guidance: branches, weights, and the formula they stand for."""

from __future__ import annotations

import pytest
import torch

from dualforce.generate.guidance import Branch, combine, guidance_branches
from dualforce.types import Velocity


def test_scales_of_one_need_one_branch() -> None:
    assert guidance_branches(1.0, 1.0, has_text=True) == (Branch(1.0, text=True, audio=True),)
    assert guidance_branches(3.0, 1.0, has_text=False) == (Branch(1.0, text=False, audio=True),)


def test_no_more_branches_than_needed() -> None:
    assert len(guidance_branches(2.0, 3.0, has_text=True)) == 3
    assert [(b.text, b.audio) for b in guidance_branches(1.0, 3.0, has_text=True)] == [(True, False), (True, True)]
    assert [(b.text, b.audio) for b in guidance_branches(2.0, 2.0, has_text=True)] == [(False, False), (True, True)]
    assert [(b.text, b.audio) for b in guidance_branches(1.0, 3.0, has_text=False)] == [(False, False), (False, True)]
    assert guidance_branches(0.0, 0.0, has_text=True) == (Branch(1.0, text=False, audio=False),)


@pytest.mark.parametrize("scales", [(2.0, 3.0), (1.0, 3.0), (4.0, 1.0), (0.5, 0.0)])
def test_combination_is_the_formula(scales: tuple[float, float]) -> None:
    text_scale, audio_scale = scales
    branches = guidance_branches(text_scale, audio_scale, has_text=True)
    source = torch.Generator().manual_seed(0)
    rows = {key: torch.randn(3, 2, 4, generator=source) for key in [(False, False), (True, False), (True, True)]}
    plain, read, heard = rows.values()
    expected = plain + text_scale * (read - plain) + audio_scale * (heard - read)
    stacked = torch.stack([rows[branch.text, branch.audio] for branch in branches])
    found = combine(branches, Velocity(stacked, 2 * stacked))
    torch.testing.assert_close(found.video, expected[None], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.struct, 2 * expected[None], rtol=0, atol=1e-5)
