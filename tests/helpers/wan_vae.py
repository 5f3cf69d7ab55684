"""A Wan 2.1 VAE with random weights and few channels, written by diffusers in the published layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def write_wan_vae(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """The folder of a VAE 8 channels wide (published: 96) and otherwise of the published shape; `changes` of its
    config. The last layers are scaled so that pictures and latents use their range, not its middle."""
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(**{"base_dim": 8} | changes)
    with torch.no_grad():
        vae.encoder.conv_out.weight.mul_(5)
        vae.decoder.conv_out.weight.mul_(1.5)
    vae.save_pretrained(folder)
    return folder
