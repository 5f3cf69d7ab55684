"""The MLP, whose backward is written by hand, against the plain layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dualforce.model.layers import Mlp


@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (4, 6), (1, 1, 6)])
def test_equals_the_plain_layers_with_every_gradient(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    mlp = Mlp(6, 10).double()
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.normal_()
    plain = nn.Sequential(*copy.deepcopy(list(mlp)))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, wanted = mlp(x), plain(y)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-12)
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    (wanted * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-11)
    for (name, a), b in zip(mlp.named_parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and a.grad.abs().max() > 0, name
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-11, msg=name)


def test_the_activation_is_not_kept() -> None:
    """What autograd saves: the input of each product's weights and W1 x + b1, not the activation of its size."""
    mlp, sizes = Mlp(4, 64), []
    x = torch.randn(7, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        mlp(x)
    assert sizes.count((7, 64)) == 1
