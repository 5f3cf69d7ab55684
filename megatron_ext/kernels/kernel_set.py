"""Which implementation of each kernel the model runs, chosen once at construction."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ext.kernels.adaln import reference as adaln_reference
from megatron_ext.kernels.apex import fused_layer_norm
from megatron_ext.kernels.attention import reference as attention_reference
from megatron_ext.kernels.attention.flash import DTYPES, HEAD_DIMS, FlashAttention, FlashUnavailable
from megatron_ext.kernels.linear import reference as linear_reference
from megatron_ext.kernels.linear.products import PlainProducts
from megatron_ext.kernels.linear.quack import QuackProducts, QuackUnavailable
from megatron_ext.kernels.qk_norm_rope import reference as rope_reference

logger = logging.getLogger(__name__)

NAMES = ("auto", "reference", "fused", "flex")


@dataclass(frozen=True)
class KernelSet:
    """Kernels with equal signatures whatever their backend; see the reference of each for shapes."""

    name: str
    dtype: torch.dtype  # of the hidden states
    adaln: Callable[..., Tensor]
    gated_residual: Callable[..., Tensor]
    adaln_residual: Callable[..., tuple[Tensor, Tensor]]
    layer_norm: Callable[..., Tensor]
    split_heads: Callable[..., tuple[Tensor, ...]]
    column_sum: Callable[..., Tensor]
    product: Callable[..., Tensor]
    gelu_product: Callable[..., tuple[Tensor, Tensor]]
    gelu_product_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    frame_causal: Callable[..., Tensor]
    attend: Callable[..., Tensor]


class KernelsUnavailable(ValueError):
    """The named kernels cannot run here; the message is one line with the values and the way out."""


def select_kernels(
    name: str, device: torch.device, dtype: torch.dtype, head_dims: Mapping[str, int] | None = None
) -> KernelSet:
    """The kernels called `name` for `device`, `dtype` and the head sizes `head_dims` of attention by name.

    "reference" runs everywhere. "fused": Triton kernels with flash-attn-4 and quack-kernels (compute capability
    9.x). "flex": Triton kernels with FlexAttention (8.0 and newer). Both raise KernelsUnavailable with the reason where
    they cannot run.
    "auto" takes the fastest that can and logs it.
    """
    if name not in NAMES:
        raise KernelsUnavailable(f"kernels = {name}: expected {', '.join(NAMES[:-1])} or {NAMES[-1]}")
    if name == "reference":
        return _reference(dtype)
    if name != "auto":
        return _named(name, device, dtype, head_dims or {})
    for choice in ("fused", "flex"):
        try:
            chosen = _named(choice, device, dtype, head_dims or {})
        except KernelsUnavailable as error:
            if device.type == "cuda":
                logger.warning("%s", error)
        else:
            logger.info("kernels: %s, chosen for %s %s", choice, device.type, dtype)
            return chosen
    logger.info("kernels: reference, chosen for %s %s", device.type, dtype)
    return _reference(dtype)


def _reference(dtype: torch.dtype) -> KernelSet:
    products = PlainProducts(linear_reference.gelu_backward)
    return KernelSet(
        name="reference",
        dtype=dtype,
        adaln=adaln_reference.adaln,
        gated_residual=adaln_reference.gated_residual,
        adaln_residual=adaln_reference.adaln_residual,
        layer_norm=adaln_reference.layer_norm,
        split_heads=rope_reference.split_heads,
        column_sum=linear_reference.column_sum,
        product=products.product,
        gelu_product=products.gelu_product,
        gelu_product_backward=products.gelu_product_backward,
        frame_causal=attention_reference.frame_causal,
        attend=attention_reference.attend,
    )


def _products(name: str, plain: PlainProducts) -> PlainProducts | QuackProducts:
    """flash-attn-4 comes with quack-kernels, but with any of several versions of it."""
    if name != "fused":
        return plain
    try:
        return QuackProducts(plain)
    except QuackUnavailable as error:
        logger.warning("%s; products and activations run apart, which is slower", error)
        return plain


def _named(name: str, device: torch.device, dtype: torch.dtype, head_dims: Mapping[str, int]) -> KernelSet:
    """Triton kernels with the attention that `name` stands for."""
    here = f"kernels = {name} on {device.type} {dtype}"
    if device.type != "cuda":
        raise KernelsUnavailable(f"{here}: expected a CUDA device; use reference or auto")
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise KernelsUnavailable(f"{here}: compute capability {major}.{minor}, expected 8.0 or more; use reference")
    if dtype not in DTYPES:
        raise KernelsUnavailable(f"{here}: expected {' or '.join(map(str, DTYPES))}; enable bf16 or use reference")
    wrong = {site: size for site, size in head_dims.items() if size not in HEAD_DIMS}
    if wrong:
        shown = ", ".join(f"{site} = {size}" for site, size in wrong.items())
        raise KernelsUnavailable(f"{here}: head size {shown}; expected one of {HEAD_DIMS}; use reference")
    try:
        adaln = importlib.import_module("megatron_ext.kernels.adaln.triton")
        linear = importlib.import_module("megatron_ext.kernels.linear.triton")
        rope = importlib.import_module("megatron_ext.kernels.qk_norm_rope.triton")
    except ImportError as error:
        raise KernelsUnavailable(f"{here}: Triton does not import ({error}); install it or use reference") from None
    try:
        if name == "fused":
            attention: Any = FlashAttention(device)
        else:
            attention = importlib.import_module("megatron_ext.kernels.attention.flex").FlexAttention(device)
    except FlashUnavailable as error:
        raise KernelsUnavailable(f"{here}: {error}; or use flex") from None
    products = _products(name, PlainProducts(linear.gelu_backward))
    return KernelSet(
        name=name,
        dtype=dtype,
        adaln=adaln.adaln,
        gated_residual=adaln.gated_residual,
        adaln_residual=adaln.adaln_residual,
        layer_norm=fused_layer_norm() or adaln.layer_norm,
        split_heads=rope.split_heads,
        column_sum=linear.column_sum,
        product=products.product,
        gelu_product=products.gelu_product,
        gelu_product_backward=products.gelu_product_backward,
        frame_causal=attention.frame_causal,
        attend=attention.attend,
    )
