"""The `dct` codec: orthonormal, exact on its span, frame 0 apart, and good enough on real pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.clips import textured

from dualforce.codecs.face_box import square_crop
from dualforce.codecs.media import read_video
from dualforce.codecs.video_dct import DctVideoCodec, dct_matrix, first_basis, rest_basis, zigzag

# Measured at 256 pixels over the middle square: 29.2 to 35.7 dB on seven of the eight usable clips, and 27.1 on
# man_bald_15s, whose background of columns and bunting fills half the picture (its middle alone has 30.4).
TYPICAL_PSNR = 29.0
LEAST_PSNR = 26.5


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b).mean()))


@pytest.mark.parametrize("basis", [first_basis(), rest_basis()], ids=["first", "rest"])
def test_rows_are_orthonormal(basis: torch.Tensor) -> None:
    assert basis.shape[0] == 16
    assert (basis @ basis.T - torch.eye(16, dtype=torch.float64)).abs().max() < 1e-12


def test_the_kept_frequencies() -> None:
    """14 + 2 in frame 0, 11 + 3 + 2 in the others: read off the basis by projecting the pure waves it must hold."""
    time, space, colour = dct_matrix(4), dct_matrix(8), dct_matrix(3)
    assert torch.allclose(colour[0], torch.full((3,), 3**-0.5, dtype=torch.float64))

    def power(t: int, u: int, v: int, c: int) -> float:
        wave = torch.einsum("t,u,v,c->tuvc", time[t], space[u], space[v], colour[c]).reshape(-1)
        return float((rest_basis() @ wave).square().sum())

    luma_still = {(u, v) for u in range(8) for v in range(8) if power(0, u, v, 0) > 0.5}
    luma_moving = {(u, v) for u in range(8) for v in range(8) if power(1, u, v, 0) > 0.5}
    chroma = {(u, v, c) for u in range(8) for v in range(8) for c in (1, 2) if power(0, u, v, c) > 0.5}
    assert luma_still == set(zigzag(11)) and len(luma_still) == 11
    assert luma_moving == {(0, 0), (0, 1), (1, 0)}
    assert chroma == {(0, 0, 1), (0, 0, 2)}
    assert zigzag(6) == [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2)]


def test_exact_inverse_on_its_span() -> None:
    codec = DctVideoCodec()
    latents = torch.randn(5, 16, 4, 6, generator=torch.Generator().manual_seed(0))
    pixels = codec.decode_float(latents, first=True).double()
    assert pixels.shape == (17, 32, 48, 3)

    def blocks(values: torch.Tensor, frames: int) -> torch.Tensor:
        cut = values.reshape(-1, frames, 4, 8, 6, 8, 3).permute(0, 2, 4, 1, 3, 5, 6)
        return cut.reshape(-1, 4, 6, frames * 192)

    again = torch.cat([blocks(pixels[:1], 1) @ first_basis().T, blocks(pixels[1:], 4) @ rest_basis().T])
    assert (again.permute(0, 3, 1, 2) - latents).abs().max() < 1e-5
    # Energy is kept: the transform is orthonormal, not merely invertible.
    assert torch.allclose(pixels.square().sum().float(), latents.square().sum(), rtol=1e-5)


def test_encode_is_the_projection_onto_the_basis() -> None:
    codec = DctVideoCodec()
    pixels = textured(9, 32) // 2 + 64  # mid range, so that nothing is clipped below
    latents = codec.encode(pixels)
    block = torch.from_numpy(pixels[1:5, 8:16, 16:24]).double() / 127.5 - 1
    assert torch.allclose(latents[1, :, 1, 2].double(), rest_basis() @ block.reshape(-1), atol=1e-5)
    # Encoding what was decoded changes nothing beyond the rounding to bytes.
    assert (codec.encode(codec.decode(latents)) - latents).abs().max() < 0.1


def test_first_frame_is_independent() -> None:
    codec = DctVideoCodec()
    pixels, other = textured(9, 32, seed=1), textured(9, 32, seed=2)
    mixed = np.concatenate([pixels[:1], other[1:]])
    assert torch.equal(codec.encode(pixels)[0], codec.encode(mixed)[0])
    assert torch.equal(codec.encode(other)[1:], codec.encode(mixed)[1:])
    assert not torch.equal(codec.encode(pixels)[1:], codec.encode(mixed)[1:])
    assert torch.equal(codec.encode_image(pixels[0]), codec.encode(pixels)[0])


def test_decoding_in_pieces_equals_decoding_at_once() -> None:
    codec = DctVideoCodec()
    latents = codec.encode(textured(17, 32))
    for lengths in ((1, 2, 2), (2, 3), (0, 1, 4)):
        decoder = codec.decoder()
        pieces = [decoder.decode(part) for part in latents.split(lengths)]
        assert np.array_equal(np.concatenate(pieces), codec.decode(latents))


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((8, 16, 16, 3), np.uint8),
        np.zeros((9, 16, 12, 3), np.uint8),
        np.zeros((9, 16, 16, 4), np.uint8),
        np.zeros((9, 16, 16, 3), np.float32),
        np.zeros((16, 16, 3), np.uint8),
    ],
    ids=["8 frames", "width 12", "4 colours", "float", "no time"],
)
def test_bad_pixels(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected"):
        DctVideoCodec().encode(pixels)


def test_bad_latents() -> None:
    with pytest.raises(ValueError, match=r"expected \[F,16,h,w\]"):
        DctVideoCodec().decode(torch.zeros(2, 12, 4, 4))


def test_psnr_on_the_bundled_sample(sample_dir: Path, record_property: pytest.RecordProperty) -> None:
    codec = DctVideoCodec()
    for path in sorted(sample_dir.glob("*.mp4"))[:4]:
        frames = read_video(path, stop=21).frames
        value = psnr(frames, codec.decode(codec.encode(frames)))
        record_property(f"psnr {path.name}", round(value, 2))
        assert value >= 25.0, path.name  # native 160 pixels: a small picture has more detail per block


def test_psnr_on_real_clips(clips_dir: Path, record_property: pytest.RecordProperty) -> None:
    """At 256 pixels over the middle square of the picture, 13 pixel frames of each clip; see the figures above."""
    codec, found = DctVideoCodec(), {}
    for name in ("may_5s", "german_anchor_20s", "man_map_5s", "woman_glasses_5s", "man_bald_15s"):
        frames = read_video(clips_dir / "video" / f"{name}.mp4", stop=13).frames
        height, width = frames.shape[1:3]
        square = np.array([width / 2, height / 2, min(height, width)])
        crops = np.stack([square_crop(frame, square, 256) for frame in frames])
        found[name] = psnr(crops, codec.decode(codec.encode(crops)))
        record_property(f"psnr {name}", round(found[name], 2))
    assert min(found.values()) >= LEAST_PSNR, found
    assert sorted(found.values())[1] >= TYPICAL_PSNR, found  # all but the lowest
