"""What the backward computes again instead of keeping, and where the inputs of recomputed modules wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Recompute = Literal["none", "selective", "full", "offload"]

OFFLOAD_BYTES = 1 << 20  # smaller tensors stay: a transfer costs more than it frees


class _OnHost(NamedTuple):
    data: Tensor  # page-locked
    device: torch.device
    ready: torch.cuda.Event


def recomputed(run: Callable[..., Any], args: tuple[Any, ...], policy: Recompute) -> Any:
    """run(*args), computed again in the backward (Chen et al. 2016, arXiv 1604.06174): only `args` are kept, on the
    device or, with "offload", in host memory."""
    # Nothing in a block draws random numbers, so their state need not be kept.
    if policy != "offload":
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
    stream = torch.cuda.Stream() if torch.cuda.is_available() else None
    with saved_tensors_hooks(lambda saved: _to_host(saved, stream), _from_host):
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


def _to_host(saved: Tensor, stream: torch.cuda.Stream | None) -> Any:
    if stream is None or saved.device.type != "cuda" or saved.numel() * saved.element_size() < OFFLOAD_BYTES:
        return saved
    stream.wait_stream(torch.cuda.current_stream(saved.device))
    with torch.cuda.stream(stream):
        host = torch.empty(saved.shape, dtype=saved.dtype, device="cpu", pin_memory=True)
        host.copy_(saved, non_blocking=True)
        saved.record_stream(stream)
        ready = torch.cuda.Event()
        ready.record(stream)
    return _OnHost(host, saved.device, ready)


def _from_host(kept: Any) -> Any:
    if not isinstance(kept, _OnHost):
        return kept
    torch.cuda.current_stream(kept.device).wait_event(kept.ready)
    return kept.data.to(kept.device, non_blocking=True)
