"""Cached, chunk by chunk, gives what the full frame-causal forward gives."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from helpers.tiny_model import random_inputs, tiny_config, tiny_model
from torch import Tensor

from dualforce.model.kv_cache import KVCache
from dualforce.model.path import CachedPath, FullPath
from dualforce.types import Conditioning, FrameSigma, FrameSpan, Noised, Velocity, chunk_of
from megatron_ext.kernels.kernel_set import select_kernels

KERNELS = select_kernels("reference", torch.device("cpu"), torch.float32)

# The same numbers through other matrix shapes: fp32 rounding through a few layers, well below 1e-5 at order-1 outputs.
TOLERANCE = 1e-5


def random_case(seed: int) -> tuple[int, int, int | None, int, int]:
    """(frames, frames per chunk, window, sink, chunks at a time)."""
    source = random.Random(seed)
    chunk = source.randint(1, 4)
    frames = source.randint(2, 14)
    window = source.choice([None, 1, 2, 3, 4])
    return frames, chunk, window, source.randint(0, 3), source.choice([1, 1, 1, 2])


def spans(frames: int, chunk: int, at_once: int) -> list[FrameSpan]:
    """Chunks [1, n, n, ...], the last one possibly short, `at_once` together."""
    edges = [0, *(f for f in range(1, frames) if chunk_of(f, chunk) != chunk_of(f - 1, chunk)), frames]
    edges = [*edges[:-1:at_once], frames]
    return [FrameSpan(a, b - a) for a, b in itertools.pairwise(edges)]


def cut(noised: Noised, cond: Conditioning, span: FrameSpan, sigma: FrameSigma) -> tuple[Noised, Conditioning]:
    own = slice(span.start, span.stop)
    part = Noised(noised.video[:, own], noised.struct[:, own], FrameSigma(sigma.video[:, own], sigma.struct[:, own]))
    return part, cond._replace(audio=cond.audio[:, own])


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("seed", range(60))
def test_cached_equals_full(seed: int) -> None:
    """Denoising pass of each chunk at its own level against clean earlier chunks, as in generation: the full forward
    sees sigma 0 before the chunk and the chunk's own sigma in it."""
    frames, chunk, window, sink, at_once = random_case(seed)
    config = tiny_config(frames_per_chunk=chunk, window=window, sink=sink, bridge={"layers": "full"})
    model = tiny_model(config, seed)
    noised, cond = random_inputs(config, frames=frames, seed=seed)
    clean = FrameSigma(torch.zeros_like(noised.sigma.video), torch.zeros_like(noised.sigma.struct))
    cache = KVCache(chunk, window, sink)
    with torch.no_grad():
        for span in spans(frames, chunk, at_once):
            path = CachedPath(cache, KERNELS, span)
            cached = model(*cut(noised, cond, span, noised.sigma), span, path)
            full = full_forward(model, noised, cond, span, clean)
            for stream in Velocity._fields:
                assert largest(getattr(cached, stream), getattr(full, stream)) <= TOLERANCE, (stream, span)
            model(*cut(noised, cond, span, clean), span, path)  # the clean pass writes what the cache keeps
            cache.commit(span)


def full_forward(model, noised: Noised, cond: Conditioning, span: FrameSpan, clean: FrameSigma) -> Velocity:  # type: ignore[no-untyped-def]
    stop = span.stop
    sigma = FrameSigma(
        *(torch.cat((c[:, : span.start], s[:, span.start : stop]), 1) for c, s in zip(clean, noised.sigma, strict=True))
    )
    whole = FrameSpan(0, stop)
    part, conditions = cut(noised, cond, whole, sigma)
    out = model(part, conditions, whole, FullPath(model.rule, KERNELS, whole))
    return Velocity(out.video[:, span.start :], out.struct[:, span.start :])


def test_stale_cache_is_caught() -> None:
    """Without the clean pass the cache keeps keys of the noisy chunk, and the next chunk differs by far more."""
    config = tiny_config(bridge={"layers": "full"})
    model = tiny_model(config)
    noised, cond = random_inputs(config, frames=5)
    clean = FrameSigma(torch.zeros_like(noised.sigma.video), torch.zeros_like(noised.sigma.struct))
    cache = KVCache(2)
    with torch.no_grad():
        for span in (FrameSpan(0, 1), FrameSpan(1, 2)):
            model(*cut(noised, cond, span, noised.sigma), span, CachedPath(cache, KERNELS, span))
            cache.commit(span)
        span = FrameSpan(3, 2)
        cached = model(*cut(noised, cond, span, noised.sigma), span, CachedPath(cache, KERNELS, span))
        full = full_forward(model, noised, cond, span, clean)
    assert largest(cached.video, full.video) > 100 * TOLERANCE


def test_window_bounds_memory() -> None:
    config = tiny_config(frames_per_chunk=2, window=2, sink=1)
    model = tiny_model(config)
    noised, cond = random_inputs(config, frames=21)
    cache = KVCache(2, 2, 1)
    held = []
    with torch.no_grad():
        for span in spans(21, 2, 1):
            model(*cut(noised, cond, span, noised.sigma), span, CachedPath(cache, KERNELS, span))
            cache.commit(span)
            held.append(len(cache.frames))
    assert max(held) <= 1 + 2 * 2
    assert cache.frames == [0, 19, 20]
