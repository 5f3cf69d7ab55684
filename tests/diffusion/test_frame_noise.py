"""Diffusion Forcing: what is drawn, with which probabilities, and from what it does not depend.

Tolerances: seeds are fixed, so no test is random; a bound of four standard deviations, sqrt(p (1 - p) / n) for a share,
says that the drawn numbers are likely ones. For uniformity it is Kolmogorov's statistic: sqrt(n) D < 1.95 holds with
probability 0.999.
"""

from __future__ import annotations

import pytest
import torch
from helpers.plain_batch import plain_batch
from torch import Tensor

from dualforce.config import NoiseConfig
from dualforce.diffusion.frame_noise import Draw, draw, draw_fixed, generator, mix, pad_draw
from dualforce.diffusion.schedule import shift

CLIPS, FRAMES, CHUNK = 1500, 9, 2
NOISY = {"p_clean_first": 0.0, "p_clean_prefix": 0.0, "p_same": 0.0}


def many(frames: int = FRAMES, **changes: float) -> Draw:
    batch = plain_batch([(0, i) for i in range(CLIPS)], frames, channels=1, size=1)
    return draw(batch, NoiseConfig(**changes), seed=7, frames_per_chunk=CHUNK)


def share_is(found: Tensor, wanted: float) -> None:
    """`found` [n] bool has the share `wanted` of True."""
    spread = (wanted * (1 - wanted) / found.numel()) ** 0.5
    assert abs(found.float().mean().item() - wanted) <= 4 * spread + 1e-9


def is_uniform(values: Tensor, low: float = 0.0, high: float = 1.0) -> None:
    ordered = ((values.double() - low) / (high - low)).flatten().sort().values
    assert ordered[0] >= -1e-6 and ordered[-1] <= 1 + 1e-6
    steps = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
    assert (ordered - steps).abs().max() * len(ordered) ** 0.5 < 1.95


def clean_frames(drawn: Draw) -> Tensor:
    """Length of the clean beginning of every clip; nothing behind it is clean."""
    clean = drawn.sigma.video == 0
    assert torch.equal(clean, drawn.sigma.struct == 0)
    lengths = clean.sum(1)
    assert torch.equal(clean, torch.arange(clean.shape[1]) < lengths[:, None])
    return lengths


def test_video_levels_are_shifted_uniform() -> None:
    is_uniform(shift(many(**NOISY).sigma.video, 1 / 3.0))
    is_uniform(shift(many(**NOISY, shift_video=5.0).sigma.video, 1 / 5.0))


def test_struct_levels_keep_mass_above_their_cap() -> None:
    sigma = many(**NOISY).sigma.struct
    share_is((sigma > 0.7).flatten(), 0.2)
    is_uniform(sigma[sigma <= 0.7], 0.0, 0.7)
    is_uniform(sigma[sigma > 0.7], 0.7, 1.0)


@pytest.mark.parametrize("cap", [0.5, 1.0])
def test_struct_cap(cap: float) -> None:
    is_uniform(many(**NOISY, max_sigma_struct=cap, p_above_max_struct=0.0).sigma.struct, 0.0, cap)


def test_levels_are_independent_over_towers_and_frames() -> None:
    sigma = many(**NOISY).sigma
    both = torch.cat((sigma.video, sigma.struct), dim=1)
    off_diagonal = torch.corrcoef(both.T) - torch.eye(2 * FRAMES)
    assert off_diagonal.abs().max() < 4.5 / CLIPS**0.5  # 153 pairs at once: a little more than four


def test_clean_beginnings() -> None:
    """With probability 1/2 the clean prefix is 1 .. 4 of the 5 chunks, else frame 0 alone is clean with 0.8."""
    lengths = clean_frames(many())
    wanted = {0: 0.5 * 0.2, 1: 0.5 * 0.8 + 0.5 / 4, 3: 0.5 / 4, 5: 0.5 / 4, 7: 0.5 / 4}
    for length, share in wanted.items():
        share_is(lengths == length, share)
    assert set(lengths.tolist()) == set(wanted)  # whole chunks, and never all of them


@pytest.mark.parametrize(
    ("frames", "lengths"), [(1, {0}), (2, {1}), (3, {1}), (4, {1, 3}), (5, {1, 3}), (6, {1, 3, 5})]
)
def test_a_prefix_is_whole_chunks_and_never_everything(frames: int, lengths: set[int]) -> None:
    """Also where the last chunk is short."""
    assert set(clean_frames(many(frames, p_clean_first=1.0, p_clean_prefix=1.0)).tolist()) == lengths


def test_options_off_and_on() -> None:
    assert not clean_frames(many(p_clean_first=0.0, p_clean_prefix=0.0)).any()
    assert (clean_frames(many(p_clean_first=1.0, p_clean_prefix=0.0)) == 1).all()
    assert many(p_drop=0.0).keep.all() and not many(p_drop=1.0).keep.any()


def test_same_level_in_all_noisy_frames() -> None:
    """Independently for the two towers."""
    sigma = many(p_clean_first=0.0, p_clean_prefix=0.0).sigma
    same_video, same_struct = ((x == x[:, :1]).all(1) for x in sigma)
    share_is(same_video, 0.1)
    share_is(same_struct, 0.1)
    share_is(same_video & same_struct, 0.01)
    mixed = many(p_same=1.0, p_clean_first=1.0, p_clean_prefix=0.0).sigma.video
    assert (mixed[:, 1:] == mixed[:, 1:2]).all() and (mixed[:, 0] == 0).all()


def test_conditions_are_dropped_apart() -> None:
    keep = many().keep
    for i in range(3):
        share_is(~keep[:, i], 0.1)
    share_is(~keep[:, 0] & ~keep[:, 2], 0.01)


def test_noise_is_normal_and_the_first_struct_frame_has_one_draw() -> None:
    noise = many().noise
    assert (noise.struct[:, 0] == noise.struct[:, 0, :1]).all()
    assert (noise.struct[:, 1:, 0] != noise.struct[:, 1:, 1]).any(-1).all()
    for x in (noise.video, noise.struct[:, 0, 0], noise.struct[:, 1:]):
        assert abs(x.mean().item()) < 4 / x.numel() ** 0.5
        assert x.var().item() == pytest.approx(1, abs=4 * (2 / x.numel()) ** 0.5)


def equal(one: Draw, other: Draw) -> bool:
    return all(
        torch.equal(a, b)
        for a, b in zip((*one.sigma, *one.noise, one.keep), (*other.sigma, *other.noise, other.keep), strict=True)
    )


def rows(drawn: Draw, places: list[int]) -> Draw:
    sigma = type(drawn.sigma)(*(x[places] for x in drawn.sigma))
    noise = type(drawn.noise)(*(x[places] for x in drawn.noise))
    return Draw(sigma, noise, drawn.keep[places])


def test_a_clips_numbers_do_not_depend_on_the_others() -> None:
    config = NoiseConfig()
    whole = draw(plain_batch([(0, 3), (0, 7), (1, 3)]), config, 5, CHUNK)
    assert equal(rows(whole, [1]), draw(plain_batch([(0, 7)], seed=9), config, 5, CHUNK))
    assert equal(rows(whole, [2, 0]), draw(plain_batch([(1, 3), (0, 3)], seed=9), config, 5, CHUNK))
    again = draw(plain_batch([(0, 3), (0, 7), (1, 3)]), config, 6, CHUNK)
    for place in range(3):
        others = [rows(whole, [i]) for i in range(3) if i != place]
        assert not any(torch.equal(rows(whole, [place]).noise.video, other.noise.video) for other in others)
        assert not torch.equal(rows(whole, [place]).noise.video, rows(again, [place]).noise.video)


def test_the_global_generator_plays_no_part() -> None:
    batch = plain_batch([(0, 0)])
    state = torch.get_rng_state()
    first = draw(batch, NoiseConfig(), 0, CHUNK)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert equal(first, draw(batch, NoiseConfig(), 0, CHUNK))


def test_one_option_does_not_move_the_others() -> None:
    plain, other = many(**NOISY), many(p_clean_first=1.0, p_clean_prefix=0.0, p_same=0.0)
    assert torch.equal(plain.noise.video, other.noise.video) and torch.equal(plain.keep, other.keep)
    assert torch.equal(plain.sigma.video[:, 1:], other.sigma.video[:, 1:])


def test_validation_levels() -> None:
    batch = plain_batch([(0, 3), (4, 5)])
    drawn = draw_fixed(batch, [0.25, 0.75], seed=1)
    for x in drawn.sigma:
        assert x.tolist() == [[0, 0.25, 0.25, 0.25, 0.25], [0, 0.75, 0.75, 0.75, 0.75]]
    assert drawn.keep.all()
    same = draw_fixed(plain_batch([(9, 3), (9, 5)]), [0.25, 0.75], seed=1)  # whatever the epoch
    assert equal(drawn, same)
    assert not torch.equal(drawn.noise.video[0], drawn.noise.video[1])
    assert (drawn.noise.struct[:, 0] == drawn.noise.struct[:, 0, :1]).all()
    trained = draw(batch, NoiseConfig(), 1, CHUNK)
    assert not torch.equal(trained.noise.video, drawn.noise.video)


def test_mix_and_back() -> None:
    batch = plain_batch([(0, 0), (0, 1)])
    drawn = draw(batch, NoiseConfig(p_drop=0.5), 3, CHUNK)
    noised, target, cond = mix(batch, drawn)
    for name in ("video", "struct"):
        clean, noise = getattr(batch, name), getattr(drawn.noise, name)
        x, v, sigma = getattr(noised, name), getattr(target, name), getattr(drawn.sigma, name)
        level = sigma.reshape(*sigma.shape, *[1] * (x.dim() - 2))
        torch.testing.assert_close(v, noise - clean)
        torch.testing.assert_close(x, (1 - level) * clean + level * noise)
        torch.testing.assert_close(x - level * v, clean)
        torch.testing.assert_close(x + (1 - level) * v, noise)
        assert torch.equal(x[sigma == 0], clean[sigma == 0]) and (sigma == 0).any()
    assert torch.equal(torch.stack((cond.audio_keep, cond.reference_keep, cond.text_keep), 1), drawn.keep)
    assert cond.audio is batch.audio and cond.reference is batch.reference and cond.text is batch.text
    assert noised.sigma is drawn.sigma


def test_padding_is_clean_noiseless_and_at_the_end() -> None:
    drawn = draw(plain_batch([(0, 0), (0, 1)]), NoiseConfig(), 3, CHUNK)
    padded = pad_draw(drawn, 8)
    for before, after in zip((*drawn.sigma, *drawn.noise), (*padded.sigma, *padded.noise), strict=True):
        assert after.shape[1] == 8 and after.shape[2:] == before.shape[2:]
        assert torch.equal(after[:, :5], before) and not after[:, 5:].any()
    assert equal(pad_draw(drawn, 5), drawn)


def test_generator_depends_on_every_part_of_its_key() -> None:
    keys = [("a", 1, 2), ("a", 1, 3), ("a", 2, 1), ("b", 1, 2), ("a", 12), ("a", 1, 2, 0), ("a", "1", 2)]
    firsts = {torch.rand(1, generator=generator(*key)).item() for key in keys}
    assert len(firsts) == len(keys)
    assert torch.rand(1, generator=generator("a", 1, 2)).item() in firsts
