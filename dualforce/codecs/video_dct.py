"""The `dct` video codec: a fixed orthonormal space-time transform, so that a fresh clone needs no weights.

Each block of 8x8 pixels is written in an orthonormal basis of products (time) x (row) x (column) x (colour) of discrete
cosines (DCT-II, Ahmed, Natarajan and Rao 1974) and 16 coefficients of it are kept:

- pixel frame 0 alone: the 14 lowest spatial frequencies of luma in zig-zag order and the mean of both chroma rows;
- pixel frames 4j-3 .. 4j (latent frame j): of luma the 11 lowest spatial frequencies constant in time and the 3 lowest
  of the first temporal frequency, and the mean of both chroma rows.

Colour is the 3-point DCT over (r, g, b): its first row (1,1,1)/sqrt(3) is luma, the other two are chroma. The rows of
the basis B are orthonormal, so encoding is x -> B x, decoding y -> B^T y, and decoding then encoding is the identity.
Latents are not normalised; their statistics live in the shard manifest. Pixels 0..255 are mapped to [-1, 1].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dualforce.codecs.pixels import check_pixels, to_bytes, to_unit
from dualforce.codecs.protocols import VIDEO_STRIDE, Pixels
from dualforce.types import PIXEL_FRAMES_PER_LATENT, latent_frames

TAG = "dct-4x8x8-16-v1"
CHANNELS = 16
BLOCK = VIDEO_STRIDE
FIRST_LUMA = 14
LUMA_STILL = 11
LUMA_MOVING = 3


class DctVideoCodec:
    """Codec of F latent frames [F,16,H/8,W/8] fp32 for P = 1 + 4 (F-1) pixel frames [P,H,W,3] uint8.

    Frame 0 does not depend on the others, nor they on it, and every latent frame decodes alone.
    """

    tag = TAG
    channels = CHANNELS

    def __init__(self) -> None:
        self._first = first_basis().float()
        self._rest = rest_basis().float()

    def encode(self, pixels: Pixels) -> Tensor:
        """Latents [F,16,H/8,W/8] fp32 of pixels [P,H,W,3] uint8; raises ValueError for another shape or type."""
        check_pixels(pixels, 4)
        latent_frames(pixels.shape[0])
        first = _to_blocks(pixels[:1], 1) @ self._first.T
        rest = _to_blocks(pixels[1:], PIXEL_FRAMES_PER_LATENT) @ self._rest.T
        return torch.cat([first, rest]).permute(0, 3, 1, 2).contiguous()

    def encode_image(self, picture: Pixels) -> Tensor:
        """Latent [16,H/8,W/8] fp32 of one picture [H,W,3] uint8, coded as latent frame 0 is."""
        check_pixels(picture, 3)
        return self.encode(picture[None])[0]

    def decode(self, latents: Tensor) -> Pixels:
        """Pixels [P,H,W,3] uint8 of a clip's latents [F,16,h,w], the first of which is frame 0."""
        return self.decoder().decode(latents)

    def decoder(self) -> DctDecoder:
        """A decoder at the start of a clip."""
        return DctDecoder(self)

    def coded(self, height: int, width: int) -> dict[str, Any]:
        """Nothing: the tag says all."""
        return {}

    def decode_float(self, latents: Tensor, first: bool) -> Tensor:
        """Pixels fp32 [P,H,W,3] on the scale [-1, 1], neither clipped nor rounded, of consecutive latent frames
        [n,16,h,w]; `first`: latents[0] is the clip's frame 0."""
        if latents.ndim != 4 or latents.shape[1] != CHANNELS:
            raise ValueError(f"latents {tuple(latents.shape)}: expected [F,{CHANNELS},h,w]")
        values = latents.detach().to("cpu", torch.float32).permute(0, 2, 3, 1)
        head = 1 if first else 0
        parts = [
            _from_blocks(values[:head] @ self._first, 1),
            _from_blocks(values[head:] @ self._rest, PIXEL_FRAMES_PER_LATENT),
        ]
        return torch.cat(parts)


class DctDecoder:
    """Decodes one clip piece by piece. Frames are independent; all that is kept is whether frame 0 is behind."""

    def __init__(self, codec: DctVideoCodec) -> None:
        self._codec, self._begun = codec, False

    def decode(self, latents: Tensor) -> Pixels:
        """Pixels of the clip's next latent frames [n,16,h,w]: one of frame 0, four of every other."""
        values = self._codec.decode_float(latents, first=not self._begun)
        self._begun = self._begun or len(latents) > 0
        return to_bytes(values)


def first_basis() -> Tensor:
    """Basis of frame 0, [16, 8*8*3] float64 with orthonormal rows over (row, column, colour)."""
    space, colour = dct_matrix(BLOCK), dct_matrix(3)
    rows = [_product(space[u], space[v], colour[0]) for u, v in zigzag(FIRST_LUMA)]
    rows += [_product(space[0], space[0], colour[c]) for c in (1, 2)]
    return torch.stack(rows)


def rest_basis() -> Tensor:
    """Basis of the other frames, [16, 4*8*8*3] float64 with orthonormal rows over (time, row, column, colour)."""
    time, space, colour = dct_matrix(PIXEL_FRAMES_PER_LATENT), dct_matrix(BLOCK), dct_matrix(3)
    rows = [_product(time[0], space[u], space[v], colour[0]) for u, v in zigzag(LUMA_STILL)]
    rows += [_product(time[1], space[u], space[v], colour[0]) for u, v in zigzag(LUMA_MOVING)]
    rows += [_product(time[0], space[0], space[0], colour[c]) for c in (1, 2)]
    return torch.stack(rows)


def dct_matrix(size: int) -> Tensor:
    """Orthonormal DCT-II, [frequency, place] float64: c_k cos(pi (2n+1) k / 2N), c_0 = sqrt(1/N), else sqrt(2/N)."""
    k = torch.arange(size, dtype=torch.float64)[:, None]
    n = torch.arange(size, dtype=torch.float64)[None, :]
    matrix = torch.cos(math.pi * (2 * n + 1) * k / (2 * size)) * math.sqrt(2 / size)
    matrix[0] = math.sqrt(1 / size)
    return matrix


def zigzag(count: int) -> list[tuple[int, int]]:
    """The first `count` (row, column) frequencies in the zig-zag order of JPEG (ITU-T T.81, figure A.6)."""
    places = [(u, v) for u in range(BLOCK) for v in range(BLOCK)]
    return sorted(places, key=lambda p: (p[0] + p[1], p[0] if (p[0] + p[1]) % 2 else p[1]))[:count]


def _product(*factors: Tensor) -> Tensor:
    """Flattened outer product of vectors."""
    result = torch.ones(1, dtype=torch.float64)
    for factor in factors:
        result = torch.outer(result, factor).reshape(-1)
    return result


def _to_blocks(pixels: Pixels, frames: int) -> Tensor:
    """Pixels [n*frames,H,W,3] uint8 -> blocks [n,h,w,frames*8*8*3] fp32 in [-1, 1]."""
    values = to_unit(pixels)
    count, height, width, _ = values.shape
    shape = (count // frames, frames, height // BLOCK, BLOCK, width // BLOCK, BLOCK, 3)
    blocks = values.reshape(shape).permute(0, 2, 4, 1, 3, 5, 6)
    return blocks.reshape(shape[0], shape[2], shape[4], frames * BLOCK * BLOCK * 3)


def _from_blocks(blocks: Tensor, frames: int) -> Tensor:
    """Blocks [n,h,w,frames*8*8*3] -> pixels [n*frames,8h,8w,3], the reverse of `_to_blocks`."""
    count, height, width, _ = blocks.shape
    values = blocks.reshape(count, height, width, frames, BLOCK, BLOCK, 3).permute(0, 3, 1, 4, 2, 5, 6)
    return values.reshape(count * frames, height * BLOCK, width * BLOCK, 3)
