"""Large tensors lie in memory of earlier ones, and no batch in that of one that is still there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.fake_shards import write_fake_shards
from torch import Tensor

from data_shards.reader import ShardSet
from dualforce import reused
from dualforce.config import NoiseConfig
from dualforce.data.collate import collate
from dualforce.data.order import ClipRef
from dualforce.data.statistics import StreamStatistics
from dualforce.diffusion.frame_noise import draw, generator, mix
from dualforce.types import ClipBatch

MakeBatch = Callable[[int], ClipBatch]


@pytest.fixture
def batch_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeBatch:
    """Batch of two of eight clips, from clip n on; every tensor counts as large."""
    monkeypatch.setattr(reused, "SMALLEST", 1)
    opened = ShardSet.open(write_fake_shards(tmp_path, clips=8, frames=5))
    reader, statistics = opened.split("train"), StreamStatistics.from_manifest(opened.manifest)

    def make(first: int) -> ClipBatch:
        refs = [ClipRef(1, number, number) for number in (first, first + 1)]
        return collate([reader.read(ref.index) for ref in refs], refs, statistics, frames=5, context=2, text_dim=4)

    return make


def test_memory_of_a_large_tensor_serves_the_next() -> None:
    first = reused.empty((3, 2**18))
    assert first.shape == (3, 2**18) and first.dtype == torch.float32 and first.is_contiguous()
    place = first.data_ptr()
    row = first[1]
    del first
    second = reused.empty((3, 2**18))
    assert second.data_ptr() != place  # `row` is still there
    del row
    assert place in (reused.empty((3 * 2**18,)).data_ptr(), reused.empty((2**18, 3)).data_ptr())


def test_shapes_types_and_small_tensors() -> None:
    for shape, dtype in (
        ((), torch.float32),
        ((0, 3), torch.float32),
        ((5, 2**19), torch.float16),
        ((3,), torch.int64),
    ):
        made = reused.empty(shape, dtype)
        assert made.shape == shape and made.dtype == dtype and made.device.type == "cpu"
    like = reused.empty_like(torch.zeros(3, 2**19).t())
    assert like.shape == (2**19, 3) and like.is_contiguous()


def test_batches_that_are_held_stay_as_they_were(batch_at: MakeBatch) -> None:
    held: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
    for number in range(40):
        batch = batch_at(number % 7)
        drawn = draw(batch, NoiseConfig(), seed=number, frames_per_chunk=2)
        noised, target, _ = mix(batch, drawn)
        tensors = [batch.video, batch.struct, *drawn.noise, noised.video, noised.struct, *target]
        held[number % 3] = tensors, [x.clone() for x in tensors]
        del batch, drawn, noised, target, tensors
        assert all(torch.equal(x, y) for found in held.values() for x, y in zip(*found, strict=True))


def test_noise_and_mixture_are_those_of_new_memory(batch_at: MakeBatch) -> None:
    """A generator fills memory that it is given with the numbers that it would make a tensor of, and the formula of
    model reference, section 2, gives the same bits."""
    for first in (0, 3, 0):
        batch = batch_at(first)
        drawn = draw(batch, NoiseConfig(), seed=9, frames_per_chunk=2)
        noised, target, _ = mix(batch, drawn)
        for row, position in enumerate(batch.position):
            source = generator("train", 9, *position)
            for count in (5, 3, 15):  # what is drawn before the noise
                torch.rand(count, generator=source)
            assert torch.equal(drawn.noise.video[row], torch.randn(batch.video.shape[1:], generator=source))
        for x, e, sigma, v, mixed in zip(
            (batch.video, batch.struct), drawn.noise, drawn.sigma, target, (noised.video, noised.struct), strict=True
        ):
            assert torch.equal(v, e - x)
            assert torch.equal(mixed, x + sigma.reshape(*sigma.shape, *[1] * (x.dim() - 2)) * v)


def test_clips_are_normalised_as_one_tensor_is(batch_at: MakeBatch) -> None:
    generator_ = torch.Generator().manual_seed(0)
    clips = [torch.randn(4, 3, 8, 6, generator=generator_).to(dtype) for dtype in (torch.float16, torch.float16)]
    mean, std = torch.randn(2, 3, generator=generator_), torch.rand(2, 3, generator=generator_) + 0.1
    one = torch.zeros(1)
    statistics = StreamStatistics(mean, std, one, one, one, one)
    assert torch.equal(statistics.normalise_clips(clips), statistics.normalise_video(torch.stack(clips)))
    with pytest.raises(ValueError, match=r"video of shape \[4, 2, 8, 6\]"):
        statistics.normalise_clips([clip[:, :2] for clip in clips])
    with pytest.raises(ValueError, match="expected one shape"):
        statistics.normalise_clips([clips[0], clips[1][..., :1]])
