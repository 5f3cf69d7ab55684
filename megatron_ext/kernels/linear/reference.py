"""Sums that the backward of linear layers needs beside its matrix products.

x, hidden, grad [...,D] of any number of dimensions, rows and strides; a sum over all but the last dimension is a
gradient of a bias. Sums are taken in fp32 at least and rounded once to the dtype of what is summed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def column_sum(x: Tensor) -> Tensor:
    """[...,D] -> [D]."""
    wide = x.dtype if x.dtype.itemsize >= 4 else torch.float32
    return x.reshape(-1, x.shape[-1]).sum(0, dtype=wide).to(x.dtype)


def gelu_backward(hidden: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """hidden and the gradient of its activation, [...,D] of one dtype -> the activation gelu(hidden) in its tanh form
    (Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2), the gradient of hidden, and that of a bias added to it:
    the column sum [D] of the gradient of hidden as rounded to its dtype."""
    check_pair(hidden, grad)
    activation = functional.gelu(hidden, approximate="tanh")
    by_hidden = torch.ops.aten.gelu_backward(grad, hidden, approximate="tanh")
    return activation, by_hidden, column_sum(by_hidden)


def check_pair(hidden: Tensor, grad: Tensor) -> None:
    """Another shape would broadcast, or be read beyond its end, without a word."""
    if hidden.shape != grad.shape or hidden.dtype != grad.dtype:
        raise ValueError(
            f"grad {grad.dtype} {tuple(grad.shape)} for hidden {hidden.dtype} {tuple(hidden.shape)}: expected the same"
        )
