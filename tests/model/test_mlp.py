"""The linear layers of token streams and the MLP, whose backwards are written by hand, against the plain layers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.tiny_model import kernels, randomise, tiny_config
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from dualforce.model.block import Block
from dualforce.model.layers import Mlp, linear
from dualforce.model.path import VIDEO, ChunkRule, FullPath, Site
from dualforce.model.rope import video_rotary
from dualforce.types import FrameSpan
from megatron_ext.kernels.kernel_set import KernelSet

WIDE = kernels(torch.float64)
SHAPES = [(2, 3, 5, 6), (4, 6), (1, 1, 6), (6,)]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def pair_of_mlps() -> tuple[Mlp, nn.Sequential]:
    """The MLP and its layers in a row, with equal parameters, none of them zero."""
    mlp = Mlp(6, 10, WIDE).double()
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_()
    return mlp, nn.Sequential(*copy.deepcopy(list(mlp)))


def gradients(out: Tensor, above: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(out, leaves, above)
    assert all(gradient.abs().max() > 0 for gradient in found)
    return list(found)


def strided(x: Tensor) -> Tensor:
    """The same values in every other column of a wider tensor."""
    return torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0]


@pytest.mark.parametrize("layout", [Tensor.contiguous, strided])
@pytest.mark.parametrize("shape", SHAPES)
def test_mlp_equals_the_plain_layers_with_every_gradient(shape: tuple[int, ...], layout: Any) -> None:
    mlp, plain = pair_of_mlps()
    x = layout(normal(*shape)).requires_grad_()
    out, wanted = mlp(x), plain(x)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    above = layout(normal(*shape))
    names = ["x", *dict(mlp.named_parameters())]
    found = gradients(out, above, [x, *mlp.parameters()])
    exact = gradients(wanted, above, [x, *plain.parameters()])
    for name, a, b in zip(names, found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11, msg=name)


@pytest.mark.parametrize("layout", [Tensor.contiguous, strided])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_equals_the_plain_product_with_every_gradient(shape: tuple[int, ...], layout: Any) -> None:
    x, weight, bias = (t.requires_grad_() for t in (layout(normal(*shape)), normal(4, 6), normal(4)))
    out, wanted = linear(x, weight, bias, WIDE), functional.linear(x, weight, bias)
    assert torch.equal(out, wanted)
    above = layout(normal(*shape[:-1], 4))
    found, exact = (gradients(one, above, [x, weight, bias]) for one in (out, wanted))
    for name, a, b in zip(("x", "weight", "bias"), found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=name)


def counted(calls: list[str], plain: KernelSet) -> KernelSet:
    """Kernels that note their name when a gradient of a bias is taken by them."""

    def noted(name: str) -> Any:
        def call(*args: Tensor) -> Any:
            calls.append(name)
            return getattr(plain, name)(*args)

        return call

    return replace(plain, column_sum=noted("column_sum"), gelu_product_backward=noted("gelu_product_backward"))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_linear_gives_no_gradient_that_nobody_wants(frozen: str) -> None:
    calls: list[str] = []
    leaves = {"x": normal(5, 6), "weight": normal(4, 6), "bias": normal(4)}
    wanted = [leaf.requires_grad_() for name, leaf in leaves.items() if name != frozen]
    out = linear(*leaves.values(), counted(calls, WIDE))
    out.sum().backward()
    assert leaves[frozen].grad is None and all(leaf.grad is not None for leaf in wanted)
    assert calls == ([] if frozen == "bias" else ["column_sum"])


@pytest.mark.parametrize("frozen", ["x", "0.weight", "0.bias", "2.weight", "2.bias"])
def test_mlp_gives_no_gradient_that_nobody_wants(frozen: str) -> None:
    """Nor a product for it: there are two for each layer, one for its weight and one for its input."""
    found, products = [], []
    for module in pair_of_mlps():
        leaves = {"x": torch.ones(5, 6, dtype=torch.float64), **dict(module.named_parameters())}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name != frozen)
        out = module(leaves["x"]).sum()
        with FlopCounterMode(display=False) as counter:
            out.backward()
        products.append(counter.get_total_flops() / (2 * 5 * 6 * 10))
        found.append({name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})
    assert found[0].keys() == {"x", "0.weight", "0.bias", "2.weight", "2.bias"} - {frozen}
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-11)
    assert products[0] == products[1] == (4 if "bias" in frozen else 3)


def test_without_gradients_nothing_is_recorded() -> None:
    mlp, plain = pair_of_mlps()
    x = normal(5, 6)
    with torch.no_grad():
        assert torch.equal(mlp(x), plain(x))
        assert not linear(x, mlp[0].weight, mlp[0].bias, WIDE).requires_grad


def test_the_activation_is_not_kept() -> None:
    """What autograd saves: x, W1 x + b1 and the weights, not the activation of its size."""
    mlp, sizes = Mlp(4, 64, kernels()), []
    x = torch.randn(7, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        mlp(x)
    assert sorted(sizes) == [(4, 64), (7, 4), (7, 64), (64, 4)]


def test_the_kernels_sum_every_bias_gradient_of_a_block() -> None:
    """Of qkv and o, of q, kv and o towards the text, and of both layers of the MLP, one of them in its GELU's pass."""
    config, calls = tiny_config(), []
    span = FrameSpan(0, 2)
    set_of_kernels = counted(calls, kernels())
    block = randomise(Block(config.video, set_of_kernels, Site(VIDEO, 0)))
    rotary = video_rotary(span, 2, 3, config.video.dim // 4, torch.device("cpu"), torch.float32)
    path = FullPath(ChunkRule(2, None, 0), set_of_kernels, span)
    x, t_mod, text = torch.randn(1, 2, 6, 64), torch.randn(1, 2, 6, 64), torch.randn(1, 3, 64)
    block(x, t_mod, text, rotary, path).sum().backward()
    assert sorted(calls) == ["column_sum"] * 6 + ["gelu_product_backward"]
