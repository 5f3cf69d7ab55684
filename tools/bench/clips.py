"""Where the step benchmark's clips come from: random numbers, or a shard set through the real loader."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from data_shards.reader import ShardSet
from dualforce.config import ModelConfig
from dualforce.data.loader import StepLoader
from dualforce.data.statistics import StreamStatistics
from dualforce.data.steps import Deal
from dualforce.train.step import PreparedStep, StepContext, prepare_step
from dualforce.types import AUDIO_FRAMES, STRUCT_TOKENS, ClipBatch


class ClipSize(NamedTuple):
    """Latent frames, height and width of clips."""

    frames: int
    height: int
    width: int


class Source(NamedTuple):
    """Prepared steps, and how long the consumer has waited for them so far, in seconds."""

    steps: Iterator[PreparedStep]
    waited: Callable[[], float]


def synthetic_source(
    model: ModelConfig, context: StepContext, *, sizes: Sequence[ClipSize], text_tokens: int
) -> Source:
    """Two steps of one clip a data-parallel rank for each size, by turns."""
    grid = context.grid
    steps = [
        synthetic_step(
            model, context, frames=size.frames, latent=size[1:], text_tokens=text_tokens, clips=1,
            seed=grid.dp_rank + grid.dp * index,
        )
        for index in range(2) for size in sizes
    ]  # fmt: skip
    return Source(itertools.cycle(steps), lambda: 0.0)


def shard_source(shards: ShardSet, model: ModelConfig, context: StepContext, steps: int) -> Source:
    """`steps` steps of the train split, one clip a data-parallel rank, read as in training."""
    deal = Deal(
        statistics=StreamStatistics.from_manifest(shards.manifest),
        data=context.run.data,
        context=model.audio.context,
        text_dim=model.video.text_dim,
        seed=0,
        dp_rank=context.grid.dp_rank,
        dp_size=context.grid.dp,
        micro_batch=1,
    )
    loader = StepLoader([shards], deal, 0, steps, partial(prepare_step, context=context))
    return Source(iter(loader), lambda: loader.wait_seconds)


def synthetic_step(
    model: ModelConfig, context: StepContext, *, frames: int, latent: tuple[int, int], text_tokens: int, clips: int,
    seed: int,
) -> PreparedStep:  # fmt: skip
    """One step of `clips` clips of normal numbers, one a micro-batch; the same on all ranks that pass one `seed`."""
    return prepare_step(
        [_clip(model, frames, latent, text_tokens, seed * clips + number) for number in range(clips)], context
    )


def _clip(model: ModelConfig, frames: int, latent: tuple[int, int], text_tokens: int, number: int) -> ClipBatch:
    source = torch.Generator("cpu").manual_seed(number)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=source)

    channels = model.video.out_dim
    window = AUDIO_FRAMES + 2 * model.audio.context
    return ClipBatch(
        video=normal(frames, channels, *latent),
        struct=normal(frames, STRUCT_TOKENS, model.struct.in_dim),
        audio=normal(frames, window, model.audio.dim),
        flame=normal(frames, STRUCT_TOKENS, 56),
        flame_valid=torch.ones(1, frames, STRUCT_TOKENS, dtype=torch.bool),
        voiced=torch.ones(1, frames, dtype=torch.bool),
        reference=normal(channels, *latent),
        text=normal(text_tokens, model.video.text_dim),
        valid=torch.ones(1, frames, dtype=torch.bool),
        keys=(f"synthetic-{number}",),
        position=((0, number),),
    )
