"""Block, head and bridge against the formulas of the model reference (2.4, 2.5, 4.3), written out in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny_model import kernels, randomise, tiny_config
from torch import Tensor, nn
from torch.nn import functional

from dualforce.config import ModelConfig
from dualforce.model.attention import BridgeAttention, SelfAttention, TextAttention
from dualforce.model.block import Block, Head
from dualforce.model.bridge import BridgeLayer, BridgeRotary
from dualforce.model.path import VIDEO, ChunkRule, FullPath, Site
from dualforce.model.rope import Rotary, bridge_rotary, video_rotary
from dualforce.types import FrameSpan, chunk_of

FRAMES, HEIGHT, WIDTH = 5, 2, 3
SPAN = FrameSpan(0, FRAMES)
WIDE = kernels(torch.float64)
EPS = 1e-6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def path(config: ModelConfig) -> FullPath:
    return FullPath(ChunkRule(config.frames_per_chunk, config.window, config.sink), WIDE, SPAN)


def layer_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + EPS).sqrt()


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def turn(x: Tensor, rotary: Rotary, interleaved: bool) -> Tensor:
    """x [B,F,T,N,K] by complex multiplication."""
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    number = torch.complex(first.contiguous(), second.contiguous()) * torch.complex(*rotary)[None, :, :, None]
    parts = (number.real, number.imag)
    return torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, frames_per_chunk: int | None) -> Tensor:
    """[B,F,T,N,K] each, dense mask by chunk (none when frames_per_chunk is None) -> [B,F,Tq,N*K]."""
    shape = q.shape
    scores = torch.einsum("bqnk,blnk->bnql", q.flatten(1, 2), k.flatten(1, 2)) / shape[-1] ** 0.5
    if frames_per_chunk is not None:
        chunk = torch.tensor([chunk_of(frame, frames_per_chunk) for frame in range(FRAMES)])
        mask = chunk.repeat_interleave(q.shape[2])[:, None] >= chunk.repeat_interleave(k.shape[2])[None, :]
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("bnql,blnk->bqnk", scores.softmax(-1), v.flatten(1, 2)).flatten(2).unflatten(1, shape[1:3])


def heads(x: Tensor, count: int = 4) -> Tensor:
    return x.unflatten(-1, (count, -1))


def apart(packed: nn.Linear, x: Tensor, count: int) -> list[Tensor]:
    """The products of the matrices that are packed into one."""
    weights, biases = packed.weight.chunk(count), packed.bias.chunk(count)
    return [functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def slow_self(layer: SelfAttention, x: Tensor, rotary: Rotary) -> Tensor:
    q, k, v = apart(layer.qkv, x, 3)
    q = turn(heads(rms(q, layer.norm_q.weight)), rotary, interleaved=True)
    k = turn(heads(rms(k, layer.norm_k.weight)), rotary, interleaved=True)
    return layer.o(softmax_attention(q, k, heads(v), frames_per_chunk=2))


def slow_text(layer: TextAttention, x: Tensor, text: Tensor) -> Tensor:
    k, v = apart(layer.kv, text, 2)
    q, k = heads(rms(layer.q(x), layer.norm_q.weight)), heads(rms(k, layer.norm_k.weight))
    return layer.o(softmax_attention(q, k[:, None], heads(v)[:, None], None))


def slow_block(block: Block, x: Tensor, t_mod: Tensor, text: Tensor, rotary: Rotary) -> Tensor:
    rows = block.modulation[0] + t_mod  # [B,F,6,D]
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (rows[:, :, i, None] for i in range(6))
    x = x + gate_a * slow_self(block.self_attn, layer_norm(x) * (1 + scale_a) + shift_a, rotary)
    if hasattr(block, "cross_attn"):
        x = x + slow_text(block.cross_attn, layer_norm(x) * block.norm3.weight + block.norm3.bias, text)
    u = layer_norm(x) * (1 + scale_f) + shift_f
    return x + gate_f * block.ffn[2](gelu_tanh(block.ffn[0](u)))


def block_inputs(batch: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Rotary]:
    rotary = video_rotary(SPAN, HEIGHT, WIDTH, dim // 4, torch.device("cpu"), torch.float64)
    return (
        normal(batch, FRAMES, HEIGHT * WIDTH, dim),
        normal(batch, FRAMES, 6, dim, seed=1),
        normal(batch, 3, dim, seed=2),
        rotary,
    )


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_block(text: bool, batch: int) -> None:
    config = tiny_config(video={"text": text})
    block = randomise(Block(config.video, WIDE, Site(VIDEO, 0)).double())
    x, t_mod, prompt, rotary = block_inputs(batch, config.video.dim)
    out = block(x, t_mod, prompt, rotary, path(config))
    torch.testing.assert_close(out, slow_block(block, x, t_mod, prompt, rotary), rtol=0, atol=1e-11)
    for clip in range(batch):
        own = slice(clip, clip + 1)
        alone = block(x[own], t_mod[own], prompt[own], rotary, path(config))
        torch.testing.assert_close(out[own], alone, rtol=0, atol=1e-12)


def test_block_sees_the_text_only_where_it_has_text() -> None:
    for text in (True, False):
        config = tiny_config(video={"text": text})
        block = randomise(Block(config.video, WIDE, Site(VIDEO, 0)).double())
        x, t_mod, prompt, rotary = block_inputs(1, config.video.dim)
        same = torch.equal(*(block(x, t_mod, p, rotary, path(config)) for p in (prompt, 2 * prompt)))
        assert same is not text


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_head(batch: int) -> None:
    """A row per clip, added without its own dimension, would be right for one clip and silently wrong for two."""
    head = randomise(Head(16, 8, EPS, WIDE).double())
    x, e = normal(batch, FRAMES, 6, 16), normal(batch, FRAMES, 16, seed=1)
    out = head(x, e)
    for clip in range(batch):
        for frame in range(FRAMES):
            shift, scale = head.modulation[0] + e[clip, frame]
            wanted = (layer_norm(x[clip, frame]) * (1 + scale) + shift) @ head.head.weight.T + head.head.bias
            torch.testing.assert_close(out[clip, frame], wanted, rtol=0, atol=1e-12)


def bridge_setup(**changes: object) -> tuple[ModelConfig, BridgeLayer, Tensor, Tensor, BridgeRotary]:
    config = tiny_config(bridge={"scale": 0.75, **changes})
    layer = randomise(BridgeLayer(config, WIDE, 0).double())
    video, struct = normal(2, FRAMES, 6, config.video.dim), normal(2, FRAMES, 4, config.struct.dim, seed=1)
    cpu = torch.device("cpu")
    pairs = (bridge_rotary(SPAN, tower.head_dim, cpu, torch.float64) for tower in (config.video, config.struct))
    return config, layer, video, struct, BridgeRotary(*pairs)


def slow_bridge(one: nn.Module, x: Tensor, other: Tensor, x_rotary: Rotary, other_rotary: Rotary) -> Tensor:
    norm, inner = one.y_norm, one.inner
    assert isinstance(inner, BridgeAttention)
    y = layer_norm(other) * norm.weight + norm.bias
    k, v = apart(inner.kv, y, 2)
    q = turn(heads(rms(inner.q(x), inner.norm_q.weight)), x_rotary, interleaved=False)
    k = turn(heads(rms(k, inner.norm_k.weight)), other_rotary, interleaved=False)
    return x + 0.75 * inner.o(softmax_attention(q, k, heads(v), frames_per_chunk=2))


def test_bridge_updates_both_streams_from_the_states_that_came_in() -> None:
    config, layer, video, struct, rotary = bridge_setup()
    new_video, new_struct = layer(video, struct, rotary, path(config))
    (to_video_v, to_video_s), (to_struct_v, to_struct_s) = rotary
    wanted_video = slow_bridge(layer.struct_to_video, video, struct, to_video_v, to_video_s)
    wanted_struct = slow_bridge(layer.video_to_struct, struct, video, to_struct_s, to_struct_v)
    torch.testing.assert_close(new_video, wanted_video, rtol=0, atol=1e-11)
    torch.testing.assert_close(new_struct, wanted_struct, rtol=0, atol=1e-11)
    assert not torch.equal(new_video, video) and not torch.equal(new_struct, struct)


@pytest.mark.parametrize(("directions", "changes"), [("both", (1, 1)), ("s2v", (1, 0)), ("v2s", (0, 1))])
def test_bridge_direction(directions: str, changes: tuple[int, int]) -> None:
    config, layer, video, struct, rotary = bridge_setup(directions=directions)
    new_video, new_struct = layer(video, struct, rotary, path(config))
    assert (new_video is not video, new_struct is not struct) == changes
    kept = {name.split(".")[0] for name, _ in layer.named_parameters()}
    assert kept == {name for name, on in zip(("struct_to_video", "video_to_struct"), changes, strict=True) if on}


def test_bridge_starts_at_zero_only_when_asked() -> None:
    for zero in (True, False):
        config = tiny_config(bridge={"zero_init": zero})
        layer = BridgeLayer(config, WIDE, 0).double()
        assert layer.struct_to_video.inner.o.weight.any().item() is not zero
        assert layer.video_to_struct.inner.o.weight.any().item() is not zero
