"""Which implementation of each kernel the model runs, chosen once at construction."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.kernels.adaln import reference as adaln_reference
from megatron_ext.kernels.attention import reference as attention_reference
from megatron_ext.kernels.qk_norm_rope import reference as rope_reference

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KernelSet:
    """Kernels with equal signatures whatever their backend; see the reference of each for shapes."""

    name: str
    dtype: torch.dtype  # of the hidden states
    adaln: Callable[..., Tensor]
    gated_residual: Callable[..., Tensor]
    adaln_residual: Callable[..., tuple[Tensor, Tensor]]
    norm_rope: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    frame_causal: Callable[..., Tensor]
    attend: Callable[..., Tensor]


def select_kernels(name: str, device: torch.device, dtype: torch.dtype) -> KernelSet:
    """The kernels called `name` for `device` and `dtype`: "reference" runs everywhere, "auto" takes the fastest that is
    available and logs it, "fused" raises ValueError with the reason where it is not available."""
    if name == "fused":
        raise ValueError(f"kernels = fused: no fused kernels for {device.type} {dtype}; use reference or auto")
    if name not in ("auto", "reference"):
        raise ValueError(f"kernels = {name}: expected auto, reference or fused")
    if name == "auto":
        logger.info("kernels: reference, chosen for %s %s", device.type, dtype)
    return KernelSet(
        name="reference",
        dtype=dtype,
        adaln=adaln_reference.adaln,
        gated_residual=adaln_reference.gated_residual,
        adaln_residual=adaln_reference.adaln_residual,
        norm_rope=rope_reference.norm_rope,
        rms_norm=rope_reference.rms_norm,
        frame_causal=attention_reference.frame_causal,
        attend=attention_reference.attend,
    )
