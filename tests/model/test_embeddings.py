"""Patches, noise-level embeddings and the reference channels (model reference 2.2, 2.3 and 7)."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.tiny_model import kernels, random_inputs, randomise, tiny_config, tiny_model
from torch import Tensor, nn

from dualforce.model.layers import EmbeddingLinear, XavierLinear, ZeroLinear, sinusoid
from dualforce.model.modulation import DualSigma
from dualforce.model.path import FullPath
from dualforce.model.tower import TowerEmbedding, patchify, unpatchify
from dualforce.types import Conditioning, FrameSpan


def test_patch_embedding_is_a_convolution_of_wans_layout() -> None:
    """Conv3d(kernel = stride = (1,2,2)) with weight [d,C,1,2,2], whose flat rows are the linear layer's."""
    conv = nn.Conv3d(12, 16, (1, 2, 2), (1, 2, 2)).double()
    x = torch.randn(2, 5, 12, 4, 6, dtype=torch.float64)
    wanted = conv(x.transpose(1, 2)).permute(0, 2, 3, 4, 1).flatten(2, 3)  # [B,F,h*w,d], row-major
    found = nn.functional.linear(patchify(x, 2), conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(found, wanted)


def test_unpatchify_has_the_channel_fastest() -> None:
    patch, height, width, channels = 2, 3, 2, 4
    tokens = torch.randn(1, 2, height * width, patch * patch * channels)
    image = unpatchify(tokens, patch, height, width)
    assert image.shape == (1, 2, channels, height * patch, width * patch)
    for row in range(height * patch):
        for col in range(width * patch):
            token = (row // patch) * width + col // patch
            place = ((row % patch) * patch + col % patch) * channels
            assert torch.equal(image[:, :, :, row, col], tokens[:, :, token, place : place + channels])


def test_patch_of_one_is_the_identity() -> None:
    x = torch.randn(1, 2, 3, 4, 5)
    assert torch.equal(unpatchify(patchify(x, 1), 1, 4, 5), x)


@pytest.mark.parametrize("dim", [4, 16, 256])
def test_sinusoid_of_a_thousand_sigma_cosine_first(dim: int) -> None:
    sigma = torch.tensor([[0.0, 0.0148, 0.5], [0.7, 0.999, 1.0]], dtype=torch.float64)
    found = sinusoid(sigma, dim)
    assert found.shape == (2, 3, dim)
    half = dim // 2
    for place in range(half):
        angle = 1000 * sigma / 10000 ** (place / half)
        cosine = torch.tensor([[math.cos(a) for a in row] for row in angle.tolist()], dtype=torch.float64)
        torch.testing.assert_close(found[..., place], cosine, rtol=0, atol=1e-12)
        torch.testing.assert_close(found[..., half + place], angle.sin(), rtol=0, atol=1e-12)


def test_sinusoid_dtypes() -> None:
    assert sinusoid(torch.zeros(1, dtype=torch.float32), 4).dtype == torch.float32
    assert sinusoid(torch.zeros(1, dtype=torch.bfloat16), 4).dtype == torch.float32
    exact = sinusoid(torch.tensor([0.123456789], dtype=torch.float32).double(), 256)
    torch.testing.assert_close(sinusoid(torch.tensor([0.123456789]), 256).double(), exact, rtol=0, atol=1e-7)


def test_noise_levels_are_embedded_in_fp32_in_a_narrow_model() -> None:
    config = tiny_config().video
    tower = randomise(TowerEmbedding(config).bfloat16())
    wide = TowerEmbedding(config)
    wide.load_state_dict({name: value.float() for name, value in tower.state_dict().items()})
    sigma = torch.tensor([[0.5, 0.5004]])  # half a step of a thousand apart
    rows, exact = tower.embed_time(sigma), wide.embed_time(sigma)
    assert rows.e.dtype == rows.t_mod.dtype == torch.float32
    assert rows.e.shape == (1, 2, config.dim) and rows.t_mod.shape == (1, 2, 6, config.dim)
    torch.testing.assert_close(rows.t_mod, exact.t_mod)
    assert not torch.equal(rows.e[:, 0].bfloat16(), rows.e[:, 1].bfloat16())


def test_time_rows() -> None:
    config = tiny_config().video
    tower = randomise(TowerEmbedding(config).double())
    sigma = torch.tensor([[0.1, 0.9]], dtype=torch.float64)
    rows = tower.embed_time(sigma)
    silu = nn.functional.silu
    first, second = tower.time_embedding[0], tower.time_embedding[2]
    e = silu(sinusoid(sigma, config.freq_dim) @ first.weight.T + first.bias) @ second.weight.T + second.bias
    last = tower.time_projection[1]
    torch.testing.assert_close(rows.e, e)
    torch.testing.assert_close(rows.t_mod.flatten(2), silu(e) @ last.weight.T + last.bias)


def test_dual_sigma_tells_own_from_other() -> None:
    module = DualSigma(16, 8)
    low, high = torch.full((1, 2), 0.2), torch.full((1, 2), 0.8)
    assert not module(low, high).any()  # starts at exactly zero
    randomise(module)
    out = module(low, high)
    assert out.shape == (1, 2, 6, 8)
    assert not torch.equal(out, module(high, low)) and not torch.equal(out, module(low, low))


def test_leaves_set_their_own_start() -> None:
    torch.manual_seed(0)
    xavier, embedding, zero = XavierLinear(300, 500), EmbeddingLinear(300, 500), ZeroLinear(300, 500)
    bound = (6 / 800) ** 0.5
    assert 0.99 * bound < xavier.weight.abs().max() <= bound
    assert embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert not any(layer.bias.any() for layer in (xavier, embedding, zero)) and not zero.weight.any()


def tower_input(cond: Conditioning, start: int) -> Tensor:
    """The channels that the video tower embeds, [F,C,H,W] of one clip, for a span from `start`."""
    config = tiny_config(frames_per_chunk=3)
    model = tiny_model(config)
    noised, _ = random_inputs(config, frames=3)
    seen: list[Tensor] = []
    model.embedding.video.patch_embedding.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    span = FrameSpan(start, 3)
    model(noised, cond, span, FullPath(model.rule, kernels(), span))
    tokens = seen[0].unflatten(-1, (12, 2, 2)).unflatten(2, (2, 2))  # [B,F,h,w,C,p,q]
    image = tokens.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
    assert torch.equal(image[:, :, :4], noised.video)
    return image[0, :, 4:]


def test_reference_channels_are_those_of_the_first_frame() -> None:
    _, cond = random_inputs(tiny_config(), frames=3)
    extra = tower_input(cond, start=0)
    assert torch.equal(extra[0, :4], torch.ones(4, 4, 4)) and torch.equal(extra[0, 4:], cond.reference[0])
    assert not extra[1:].any()
    assert not tower_input(cond, start=4).any()  # frame 0 is the absolute one, not the first of the span
    dropped = cond._replace(reference_keep=torch.tensor([False]))
    assert not tower_input(dropped, start=0).any()
