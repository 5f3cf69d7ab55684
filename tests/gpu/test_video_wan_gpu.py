"""Wan's VAE at full size on a GPU, in bfloat16 as it runs there: the same promises as on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.wan_vae import write_wan_vae

from dualforce.codecs.video_wan import WanVideoCodec

pytest.importorskip("diffusers")
pytestmark = pytest.mark.gpu


def test_causal_streaming_and_repeatable(tmp_path: Path, device: str = "cuda", size: int = 256) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    codec = WanVideoCodec(write_wan_vae(tmp_path, base_dim=96), device)
    pixels = np.random.default_rng(0).integers(0, 256, (17, size, size, 3), np.uint8)
    latents = codec.encode(pixels)
    assert latents.shape == (5, 16, size // 8, size // 8) and bool(torch.isfinite(latents).all())
    assert torch.equal(codec.encode(pixels), latents)
    assert torch.equal(codec.encode_image(pixels[0]), latents[0])
    assert torch.equal(codec.encode(pixels[:9]), latents[:3])
    decoder, whole = codec.decoder(), codec.decode(latents)
    assert np.array_equal(np.concatenate([decoder.decode(part) for part in latents.split(2)]), whole)
    # bfloat16 through some twenty layers, against the same weights in float32.
    exact = WanVideoCodec(tmp_path, device, torch.float32).encode(pixels)
    assert codec.coded(size, size)["dtype"] == ("bfloat16" if device == "cuda" else "float32")
    assert (latents - exact).norm() / exact.norm() < 0.05
