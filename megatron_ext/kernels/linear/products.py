"""Products of linear layers on token streams, and the activation between two of them.

Legend: M rows (tokens), D, H, K, N widths. Matrices are two-dimensional and of one dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

GeluBackward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class PlainProducts:
    """PyTorch's products, one after the other with what comes before and after them.

    `gelu_backward`: hidden and the gradient of its activation -> activation, gradient of hidden, its column sum.
    """

    def __init__(self, gelu_backward: GeluBackward) -> None:
        self._gelu_backward = gelu_backward

    def product(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """a [M,K], b [K,N], bias [N] -> a b + bias [M,N]."""
        return a @ b if bias is None else torch.addmm(bias, a, b)

    def gelu_product(self, a: Tensor, b: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """a [M,K], b [K,N], bias [N] -> hidden = a b + bias and gelu(hidden), tanh form, both [M,N]."""
        hidden = self.product(a, b, bias)
        return hidden, functional.gelu(hidden, approximate="tanh")

    def gelu_product_backward(self, grad: Tensor, weight: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For the layer after a GELU: grad [M,D] of its output, its weight [D,H], hidden [M,H] before the GELU ->
        gelu(hidden) [M,H], the gradient of hidden [M,H], and that of a bias added to it, the column sum [H]."""
        return self._gelu_backward(hidden, self.product(grad, weight))
