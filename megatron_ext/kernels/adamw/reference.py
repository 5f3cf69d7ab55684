"""AdamW's step on flat tensors: `torch.optim.AdamW` with what comes before it (the gradient's scale) and after it (the
model's copy of the weights)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rates(NamedTuple):
    """The hyperparameters of a step, by their names in torch.optim."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


class Moments(NamedTuple):
    """What AdamW remembers: running means of the gradient and of its square, fp32 [N]."""

    mean: Tensor
    square: Tensor


def adamw_step(
    weights: Tensor, moments: Moments, grad: Tensor, copy: Tensor, rates: Rates, scale: float, number: int
) -> None:
    """Step `number` of AdamW, from 1 on (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2; decay by
    lr * weight_decay), in place.

    weights fp32 [N]; grad [N] in any float dtype, to be multiplied by `scale`; copy [N] gets the new weights in its
    dtype. Raises ValueError for tensors of other shapes, dtypes or layouts.
    """
    check(weights, moments, grad, copy)
    size, correction = corrections(rates, number)
    gradient = grad.float() * scale
    moments.mean.lerp_(gradient, 1 - rates.betas[0])
    moments.square.mul_(rates.betas[1]).addcmul_(gradient, gradient, value=1 - rates.betas[1])
    weights.mul_(1 - rates.lr * rates.weight_decay)
    weights.sub_(size * moments.mean / (moments.square.sqrt() * correction + rates.eps))
    copy.copy_(weights)


def corrections(rates: Rates, number: int) -> tuple[float, float]:
    """The size of the step, lr / (1 - beta_1^number), and 1 / sqrt(1 - beta_2^number)."""
    return rates.lr / (1 - rates.betas[0] ** number), (1 - rates.betas[1] ** number) ** -0.5


def check(weights: Tensor, moments: Moments, grad: Tensor, copy: Tensor) -> None:
    """A kernel would read beyond the end of a shorter tensor without a word."""
    for name, tensor in {"weights": weights, "mean": moments.mean, "square": moments.square}.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} in {tensor.dtype}: expected torch.float32")
    for name, tensor in {"mean": moments.mean, "square": moments.square, "grad": grad, "copy": copy}.items():
        if tensor.shape != weights.shape or not tensor.is_contiguous() or tensor.dim() != 1:
            raise ValueError(f"{name} {tuple(tensor.shape)}: expected the weights' {tuple(weights.shape)}, contiguous")
