"""Tiny shard sets of random tensors that keep the whole contract, for tests of anything that reads shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_shards.schema import ClipSample
from data_shards.writer import ShardSetWriter

FLAME_WIDTH = 56


def fake_extractors(
    *,
    channels: int = 16,
    height: int = 4,
    width: int = 4,
    struct_dim: int = 8,
    audio_dim: int = 12,
    flame: bool = False,
    text_dim: int | None = None,
) -> dict[str, dict[str, Any]]:
    """A table with the tag of the real video codec (its latents decode) and tags of its own for the rest."""
    table: dict[str, dict[str, Any]] = {
        "video": {"tag": "dct-4x8x8-16-v1", "channels": channels, "height": height, "width": width},
        "motion": {"tag": "random-motion-v1", "width": struct_dim, "names": [f"m{i}" for i in range(struct_dim)]},
        "audio": {"tag": "random-audio-v1", "width": audio_dim, "hz": 50},
    }
    if flame:
        table["flame"] = {"tag": "random-flame-v1", "width": FLAME_WIDTH}
    if text_dim is not None:
        table["text"] = {"tag": "random-text-v1", "width": text_dim}
    return table


def fake_sample(
    key: str,
    identity: str,
    extractors: dict[str, dict[str, Any]],
    *,
    frames: int = 9,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    text_tokens: int = 3,
) -> ClipSample:
    """A clip of random tensors; streams move around different means so that a wrong normalisation shows."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    video = extractors["video"]
    latent = (video["channels"], video["height"], video["width"])
    struct = 2.0 * random(frames, 4, extractors["motion"]["width"]) + 1.0
    struct[0] = struct[0, :1]
    audio = 0.5 * random(frames, 8, extractors["audio"]["width"]) - 3.0
    audio[0, :7] = audio[0, :1]
    flame = flame_valid = text = None
    if "flame" in extractors:
        flame = 0.1 * random(frames, 4, extractors["flame"]["width"]) + 0.5
        flame[0] = flame[0, :1]
        flame_valid = torch.rand(frames, 4, generator=generator) < 0.8
    if "text" in extractors:
        text = random(text_tokens, extractors["text"]["width"]).to(dtype)
    clip = 1.5 * random(frames, *latent) + 0.25
    clip[0] *= 2.0
    return ClipSample(
        key=key,
        identity=identity,
        video=clip.to(dtype),
        reference=clip[0].to(dtype),
        struct=struct,
        audio=audio.to(torch.float16),
        voiced=torch.rand(frames, generator=generator) < 0.7,
        flame=flame,
        flame_valid=flame_valid,
        text=text,
        meta={"source": f"{identity}.mp4", "first_pixel_frame": 0, "licence": "CC0-1.0"},
    )


def write_fake_shards(
    root: Path,
    *,
    clips: int = 8,
    frames: int = 9,
    height: int = 4,
    width: int = 4,
    struct_dim: int = 8,
    audio_dim: int = 12,
    flame: bool = False,
    text_dim: int | None = None,
    seed: int = 0,
    validation_clips: int = 2,
    dtype: torch.dtype = torch.float16,
    shard_bytes: int = 10**9,
) -> Path:
    """Write `clips` training and `validation_clips` held-out clips of `frames` latent frames; returns `root`."""
    extractors = fake_extractors(
        height=height, width=width, struct_dim=struct_dim, audio_dim=audio_dim, flame=flame, text_dim=text_dim
    )
    with ShardSetWriter(root, extractors, shard_bytes=shard_bytes) as writer:
        for number in range(clips + validation_clips):
            split = "train" if number < clips else "validation"
            key, identity = f"{split}-{number:04d}", f"{split}-id{number // 2:02d}"
            writer.add(
                split, fake_sample(key, identity, extractors, frames=frames, seed=seed * 10_007 + number, dtype=dtype)
            )
        writer.finish([], {"made_by": "write_fake_shards"})
    return root
