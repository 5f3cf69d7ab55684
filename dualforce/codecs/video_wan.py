"""The video VAE of Wan 2.1 (arXiv 2503.20314), from a folder as diffusers writes it.

A causal convolutional autoencoder, 4x8x8 pixels to 16 channels: pixel frame 0 is coded alone, then groups of four, each
from itself and what came before. A latent is the mode of the posterior as the encoder gives it. It is not normalised:
statistics are those of the shard manifest, as of every codec. Wan's transformers were trained on (z - latents_mean) /
latents_std with the numbers in the VAE's config.json; who takes over their weights puts these in the statistics' place.

Clips are coded one by one: another batch size may choose other convolution kernels, and then other last bits. Pictures
of more than `TILE_ABOVE` pixels are coded in overlapping tiles, to bound memory. This changes the values, follows from
the size alone, and is part of the tag's version. Legend: F latent frames, P = 1 + 4 (F-1) pixel frames.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dualforce.codecs.pixels import check_pixels, to_bytes, to_unit
from dualforce.codecs.protocols import VIDEO_STRIDE, CodecError, Pixels
from dualforce.config_file import read_json
from dualforce.types import latent_frames

KIND, VERSION = "wan2.1", "v1"
CHANNELS = 16
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
TILE_ABOVE = 1024 * 1024  # pixels of a picture
TILE, TILE_STRIDE = 512, 448  # pixels; tiles overlap by 64
MAX_BASE_DIM = 1024

# What makes it the VAE of Wan 2.1. The others of the same class, Wan 2.2's above all, have other latents.
FIXED: Mapping[str, Any] = {
    "_class_name": "AutoencoderKLWan", "z_dim": CHANNELS, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2,
    "temperal_downsample": [False, True, True], "attn_scales": [],
}  # fmt: skip
# Keys that later versions of diffusers write, and the values they have where they are absent.
IMPLIED: Mapping[str, Any] = {
    "decoder_base_dim": None, "is_residual": False, "in_channels": 3, "out_channels": 3, "patch_size": None,
    "scale_factor_temporal": 4, "scale_factor_spatial": VIDEO_STRIDE,
}  # fmt: skip


class WanVideoCodec:
    """Codec of F latent frames [F,16,H/8,W/8] fp32 for P pixel frames [P,H,W,3] uint8. The tag names the weights."""

    channels = CHANNELS

    def __init__(self, folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> None:
        """`folder`: of the VAE, or of a pipeline with it under `vae`. `dtype`: that of the network; None is bfloat16 on
        a GPU and float32 elsewhere.

        Raises ConfigError for a config.json that cannot be read, CodecError for another VAE, weights that are missing
        or damaged, and without diffusers (extra `wan`).
        """
        if not (folder / CONFIG).is_file() and (folder / "vae").is_dir():
            folder = folder / "vae"
        self._device = torch.device(device)
        self._dtype = dtype or (torch.bfloat16 if self._device.type == "cuda" else torch.float32)
        base_dim = _base_dim(folder / CONFIG)
        weights = folder / WEIGHTS
        if not weights.is_file():
            raise CodecError(f"{folder}: no weights: expected {WEIGHTS}")
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.tag = f"{KIND}-4x8x8-{CHANNELS}-{digest[:12]}-{VERSION}"
        self._vae = _load(weights, base_dim, self._dtype).to(self._device).eval()

    @torch.inference_mode()
    def encode(self, pixels: Pixels) -> Tensor:
        """Latents [F,16,H/8,W/8] fp32 on the CPU of pixels [P,H,W,3] uint8; ValueError for another shape or type."""
        check_pixels(pixels, 4)
        latent_frames(len(pixels))
        values = to_unit(pixels).permute(3, 0, 1, 2)[None].to(self._device, self._dtype)
        if tiled(*values.shape[-2:]):
            self._vae.enable_tiling(TILE, TILE, TILE_STRIDE, TILE_STRIDE)
        else:
            self._vae.disable_tiling()
        latents: Tensor = self._vae.encode(values).latent_dist.mode()[0]
        return latents.float().cpu().transpose(0, 1).contiguous()

    def encode_image(self, picture: Pixels) -> Tensor:
        """Latent [16,H/8,W/8] fp32 of one picture [H,W,3] uint8, coded as latent frame 0 is."""
        check_pixels(picture, 3)
        return self.encode(picture[None])[0]

    def decode(self, latents: Tensor) -> Pixels:
        """Pixels [P,H,W,3] uint8 of a clip's latents [F,16,h,w], the first of which is frame 0."""
        return self.decoder().decode(latents)

    def decoder(self) -> WanDecoder:
        """A decoder at the start of a clip."""
        return WanDecoder(self._vae, self._device, self._dtype)

    def coded(self, height: int, width: int) -> dict[str, Any]:
        """How pictures of this size are coded: the type of the network, and whether in tiles."""
        return {"dtype": str(self._dtype).removeprefix("torch."), "tiled": tiled(height, width)}


class WanDecoder:
    """Decodes one clip latent frame by latent frame. What the causal convolutions see of earlier frames, two of each
    feature map, is kept from call to call: memory does not grow with the clip."""

    def __init__(self, vae: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._vae, self._device, self._dtype = vae, device, dtype
        self._size: tuple[int, int] | None = None  # of the latents
        self._tiles: list[list[_Tile]] = []

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Pixels:
        """Pixels [p,8h,8w,3] of the clip's next latent frames [n,16,h,w]: one of frame 0, four of every other.

        Raises ValueError for another shape, or another size than that of the frames before.
        """
        if latents.ndim != 4 or latents.shape[1] != CHANNELS:
            raise ValueError(f"latents {tuple(latents.shape)}: expected [F,{CHANNELS},h,w]")
        height, width = latents.shape[-2:]
        if self._size is None:
            self._size, self._tiles = (height, width), _grid(self._vae, height, width)
        if (height, width) != self._size:
            raise ValueError(f"latents of {height} x {width}: expected {self._size[0]} x {self._size[1]}, as before")
        none = np.zeros((0, height * VIDEO_STRIDE, width * VIDEO_STRIDE, 3), np.uint8)
        return np.concatenate([none, *(self._next(frame) for frame in latents[:, None])])

    def _next(self, frame: Tensor) -> Pixels:
        """Pixels of one latent frame [1,16,h,w]."""
        z = self._vae.post_quant_conv(frame[:, :, None].to(self._device, self._dtype))
        values = self._blended([[tile.decode(z) for tile in row] for row in self._tiles])
        return to_bytes(values[0].permute(1, 2, 3, 0).float().cpu())

    def _blended(self, rows: list[list[Tensor]]) -> Tensor:
        """Pictures [1,3,p,H,W] of their tiles: each fades in over what it shares with the one above, then left."""
        if len(rows) == len(rows[0]) == 1:
            return rows[0][0]
        overlap, whole = TILE - TILE_STRIDE, []
        for i, row in enumerate(rows):
            for j, tile in enumerate(row):
                if i:
                    self._vae.blend_v(rows[i - 1][j], tile, overlap)  # in place, as its neighbours will see it
                if j:
                    self._vae.blend_h(row[j - 1], tile, overlap)
            whole.append(torch.cat([tile[..., :TILE_STRIDE, :TILE_STRIDE] for tile in row], dim=-1))
        height, width = (edge * VIDEO_STRIDE for edge in self._size or (0, 0))
        return torch.cat(whole, dim=-2)[..., :height, :width]


class _Tile:
    """A part of the picture, rows and columns of the latents, with the features its convolutions look back on."""

    def __init__(self, decoder: nn.Module, rows: slice, columns: slice) -> None:
        self._decoder, self._rows, self._columns = decoder, rows, columns
        self._features: list[Any] = [None] * sum(isinstance(part, nn.Conv3d) for part in decoder.modules())

    def decode(self, z: Tensor) -> Tensor:
        """Pixels [1,3,1 or 4,..] of one latent frame [1,16,1,h,w]."""
        part = z[..., self._rows, self._columns]
        pixels: Tensor = self._decoder(part, feat_cache=self._features, feat_idx=[0])
        return pixels


def tiled(height: int, width: int) -> bool:
    """Whether pictures of this size are coded in tiles."""
    return height * width > TILE_ABOVE


def _grid(vae: Any, height: int, width: int) -> list[list[_Tile]]:
    """Tiles over latents of height x width: one of all, or overlapping ones."""
    if not tiled(height * VIDEO_STRIDE, width * VIDEO_STRIDE):
        return [[_Tile(vae.decoder, slice(None), slice(None))]]
    edge, step = TILE // VIDEO_STRIDE, TILE_STRIDE // VIDEO_STRIDE
    return [
        [_Tile(vae.decoder, slice(top, top + edge), slice(left, left + edge)) for left in range(0, width, step)]
        for top in range(0, height, step)
    ]


def _base_dim(path: Path) -> int:
    """Width of the VAE in a config.json; CodecError unless it is of Wan 2.1's kind."""
    config = read_json(path)
    for key, expected in FIXED.items():
        if config.get(key) != expected:
            raise CodecError(f"{path}: {key} = {config.get(key)!r}: expected {expected!r}, as of the VAE of Wan 2.1")
    for key, expected in IMPLIED.items():
        if config.get(key, expected) != expected:
            raise CodecError(f"{path}: {key} = {config[key]!r}: expected {expected!r}, as of the VAE of Wan 2.1")
    base_dim = config.get("base_dim")
    if type(base_dim) is not int or not 1 <= base_dim <= MAX_BASE_DIM:
        raise CodecError(f"{path}: base_dim = {base_dim!r}: expected a whole number of 1 to {MAX_BASE_DIM}")
    return base_dim


def _load(weights: Path, base_dim: int, dtype: torch.dtype) -> Any:
    """The VAE with the weights of a safetensors file, every one of them and no other. Nothing is fetched or run."""
    try:
        diffusers: Any = importlib.import_module("diffusers")
    except ImportError:
        raise CodecError(f"{weights.parent}: needs diffusers: install the extra `wan`, or use the dct codec") from None
    with torch.device("meta"):  # no memory, and the global generator stays as it is
        vae = diffusers.AutoencoderKLWan(
            base_dim=base_dim, z_dim=CHANNELS, dim_mult=list(FIXED["dim_mult"]), num_res_blocks=2, attn_scales=[],
            temperal_downsample=list(FIXED["temperal_downsample"]),
        )  # fmt: skip
    expected = {name: list(value.shape) for name, value in vae.state_dict().items()}
    try:
        with safe_open(weights, framework="pt", device="cpu") as file:
            found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no iterator)
        state = load_file(weights) if found == expected else {}
    except (SafetensorError, OSError) as error:
        raise CodecError(f"{weights}: cannot be read as safetensors ({error})") from None
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            shape, wanted = (f"shape {table[name]}" if name in table else "none" for table in (found, expected))
            raise CodecError(f"{weights}: {name}: {shape}: expected {wanted}")
    vae.load_state_dict({name: value.to(dtype) for name, value in state.items()}, strict=True, assign=True)
    return vae.requires_grad_(False)
