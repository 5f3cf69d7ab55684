"""A ClipBatch of random numbers, for tests that need no shards."""

from __future__ import annotations

import torch

from dualforce.types import AUDIO_FRAMES, STRUCT_TOKENS, ClipBatch


def plain_batch(
    positions: list[tuple[int, int]], frames: int = 5, channels: int = 4, size: int = 4, seed: int = 0
) -> ClipBatch:
    """Clips at `positions` (epoch, place in the epoch); all frames real and voiced, FLAME valid everywhere."""
    source = torch.Generator("cpu").manual_seed(seed)
    batch = len(positions)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=source)

    return ClipBatch(
        video=normal(frames, channels, size, size),
        struct=normal(frames, STRUCT_TOKENS, 6),
        audio=normal(frames, AUDIO_FRAMES + 4, 5),
        flame=normal(frames, STRUCT_TOKENS, 7),
        flame_valid=torch.ones(batch, frames, STRUCT_TOKENS, dtype=torch.bool),
        voiced=torch.ones(batch, frames, dtype=torch.bool),
        reference=normal(channels, size, size),
        text=normal(3, 8),
        valid=torch.ones(batch, frames, dtype=torch.bool),
        keys=tuple(f"clip-{epoch}-{place}" for epoch, place in positions),
        position=tuple(positions),
    )
