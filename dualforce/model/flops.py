"""Floating-point operations of one forward, two for a multiply and an add, masked attention not counted.

Legend: F frames, P video tokens a frame, Q structure tokens, E text tokens, D width.

The usual convention of model FLOP utilisation: matrix products only, a training step is three forwards (attention's
backward, which is 2.5 forwards, included as two), recomputation counts for nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from dualforce.config import ModelConfig, TowerConfig
from dualforce.model.bridge import bridge_layers
from dualforce.model.path import ChunkRule
from dualforce.types import AUDIO_FRAMES, STRUCT_TOKENS

BACKWARD = 2  # forwards that a backward counts as


class Flops(NamedTuple):
    """Of one clip, forward."""

    linear: float
    attention: float

    @property
    def total(self) -> float:
        return self.linear + self.attention

    @property
    def training(self) -> float:
        """Of one clip of a training step."""
        return (1 + BACKWARD) * self.total


def forward_flops(config: ModelConfig, frames: int, video_tokens: int, text_tokens: int) -> Flops:
    """Of one clip of `frames` latent frames with `video_tokens` tokens each and `text_tokens` tokens of text."""
    plan = ChunkRule(config.frames_per_chunk, config.window, config.sink).plan(range(frames), range(frames))
    towers = ((config.video, video_tokens), (config.struct, STRUCT_TOKENS))
    linear = attention = 0.0
    for tower, tokens in towers:
        more = block_flops(tower, frames * tokens, plan.pairs(tokens, tokens), text_tokens)
        linear += tower.layers * more.linear + _ends(tower, frames, frames * tokens, text_tokens)
        attention += tower.layers * more.attention
    depth = len(bridge_layers(config))
    for (own, own_tokens), (other, other_tokens), name in ((*towers, "s2v"), (*towers[::-1], "v2s")):
        if config.bridge.directions in ("both", name):
            products = 2 * own.dim**2 * frames * own_tokens + 2 * own.dim * other.dim * frames * other_tokens
            linear += depth * 2 * products
            attention += depth * 4 * own.dim * plan.pairs(own_tokens, other_tokens)
    heard = _audio(config, frames, [(tower, tokens) for tower, tokens in towers])
    return Flops(linear + heard.linear, attention + heard.attention)


def block_flops(tower: TowerConfig, tokens: int, pairs: int, text_tokens: int) -> Flops:
    """Of one block over `tokens` tokens with `pairs` visible query-key pairs."""
    d = tower.dim
    linear = 2.0 * tokens * (4 * d * d + 2 * d * tower.ffn)
    attention = 4.0 * d * pairs
    if tower.text:
        linear += 2.0 * (tokens * 2 * d * d + text_tokens * 2 * d * d)
        attention += 4.0 * d * tokens * text_tokens
    return Flops(linear, attention)


def _ends(tower: TowerConfig, frames: int, tokens: int, text_tokens: int) -> float:
    """Embeddings, modulation with its residual, and head of one tower."""
    d, patch = tower.dim, tower.patch**2
    products = tokens * d * patch * (tower.in_dim + tower.out_dim)
    products += frames * (2 * tower.freq_dim * d + d * d + 2 * 6 * d * d)
    if tower.text:
        products += text_tokens * (tower.text_dim * d + d * d)
    return 2.0 * products


def _audio(config: ModelConfig, frames: int, towers: list[tuple[TowerConfig, int]]) -> Flops:
    audio = config.audio
    slots = AUDIO_FRAMES + 2 * audio.context
    linear = 2.0 * frames * slots * (audio.dim * audio.width + audio.width**2)
    attention = 0.0
    for tower, tokens in towers:
        inner = audio.inner or tower.dim
        seen = slots if tower is config.video else 2 + 2 * audio.context
        linear += audio.layers * 2.0 * frames * (tokens * 2 * tower.dim * inner + slots * 2 * audio.width * inner)
        attention += audio.layers * 4.0 * inner * frames * tokens * seen
    return Flops(linear, attention)
