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
    """What AdamW remembers: running means of the gradient and its square, fp32 [N], and the steps so far, fp32 []."""

    mean: Tensor
    square: Tensor
    step: Tensor


def adamw_step(weights: Tensor, moments: Moments, grad: Tensor, scale: Tensor, copy: Tensor, rates: Rates) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2; decay by lr * weight_decay), in
    place.

    weights fp32 [N]; grad [N] in any float dtype, to be multiplied by scale (fp32, one element); copy [N] gets the new
    weights in its dtype. Raises ValueError for tensors of other shapes, dtypes or layouts.
    """
    check(weights, moments, grad, copy)
    scale, size, correction = factors(moments.step, scale, rates)
    gradient = grad.float() * scale
    moments.mean.lerp_(gradient, 1 - rates.betas[0])
    moments.square.mul_(rates.betas[1]).addcmul_(gradient, gradient, value=1 - rates.betas[1])
    weights.mul_(1 - rates.lr * rates.weight_decay)
    weights.sub_(size * moments.mean / (moments.square.sqrt() * correction + rates.eps))
    copy.copy_(weights)


def factors(step: Tensor, scale: Tensor, rates: Rates) -> Tensor:
    """Raises `step` by one -> fp32 [3]: scale, the step's size lr / (1 - beta_1^step), 1 / sqrt(1 - beta_2^step)."""
    step += 1
    taken = step.double()  # beta^step is close to one: in fp32 little would be left of 1 - 0.999
    size = rates.lr / (1 - rates.betas[0] ** taken)
    return torch.stack((scale.double().view(()), size, (1 - rates.betas[1] ** taken).rsqrt())).float()


def check(weights: Tensor, moments: Moments, grad: Tensor, copy: Tensor) -> None:
    """A kernel would read beyond the end of a shorter tensor without a word."""
    for name, tensor in {"weights": weights, "mean": moments.mean, "square": moments.square}.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} in {tensor.dtype}: expected torch.float32")
    for name, tensor in {"mean": moments.mean, "square": moments.square, "grad": grad, "copy": copy}.items():
        if tensor.shape != weights.shape or not tensor.is_contiguous() or tensor.dim() != 1:
            raise ValueError(f"{name} {tuple(tensor.shape)}: expected the weights' {tuple(weights.shape)}, contiguous")
