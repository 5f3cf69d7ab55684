"""The codec around Wan 2.1's VAE: the published layout, causal, streaming, in tiles, and no other VAE."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.wan_vae import write_wan_vae
from safetensors.torch import load_file, save_file

from dualforce.codecs import video_dct, video_wan
from dualforce.codecs.protocols import CodecError, Pixels
from dualforce.codecs.registry import video_codec, video_codec_in
from dualforce.codecs.video_wan import CONFIG, WEIGHTS, WanVideoCodec, tiled
from dualforce.config import ConfigError

diffusers = pytest.importorskip("diffusers")


def noise(frames: int, height: int = 32, width: int = 48, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wan_vae(tmp_path_factory.mktemp("wan") / "vae")


@pytest.fixture(scope="module")
def codec(folder: Path) -> WanVideoCodec:
    return WanVideoCodec(folder)


# Of the published weights: 194 tensors, here by stem with the shape of the weight.
PUBLISHED = {
    "encoder.conv_in": (96, 3, 3, 3, 3),
    "encoder.down_blocks.0.conv1": (96, 96, 3, 3, 3),
    "encoder.down_blocks.2.resample.1": (96, 96, 3, 3),
    "encoder.down_blocks.3.conv_shortcut": (192, 96, 1, 1, 1),
    "encoder.down_blocks.5.time_conv": (192, 192, 3, 1, 1),
    "encoder.down_blocks.8.time_conv": (384, 384, 3, 1, 1),
    "encoder.down_blocks.10.conv2": (384, 384, 3, 3, 3),
    "encoder.mid_block.attentions.0.to_qkv": (1152, 384, 1, 1),
    "encoder.mid_block.attentions.0.proj": (384, 384, 1, 1),
    "encoder.mid_block.resnets.1.conv2": (384, 384, 3, 3, 3),
    "encoder.conv_out": (32, 384, 3, 3, 3),
    "quant_conv": (32, 32, 1, 1, 1),
    "post_quant_conv": (16, 16, 1, 1, 1),
    "decoder.conv_in": (384, 16, 3, 3, 3),
    "decoder.up_blocks.0.upsamplers.0.time_conv": (768, 384, 3, 1, 1),
    "decoder.up_blocks.0.upsamplers.0.resample.1": (192, 384, 3, 3),
    "decoder.up_blocks.1.resnets.0.conv_shortcut": (384, 192, 1, 1, 1),
    "decoder.up_blocks.2.upsamplers.0.resample.1": (96, 192, 3, 3),
    "decoder.up_blocks.3.resnets.2.conv2": (96, 96, 3, 3, 3),
    "decoder.conv_out": (3, 96, 3, 3, 3),
}


def test_the_network_is_that_of_the_published_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keys, shapes and number of parameters at full size, as the codec builds it; no memory is used for them."""
    made: list[Any] = []
    real = diffusers.AutoencoderKLWan

    def kept(**options: Any) -> Any:
        made.append(real(**options))
        return made[-1]

    monkeypatch.setattr(diffusers, "AutoencoderKLWan", kept)
    (tmp_path / CONFIG).write_text(json.dumps(video_wan.FIXED | {"base_dim": 96, "dropout": 0.0}))
    save_file({"encoder.conv_in.bias": torch.zeros(96)}, tmp_path / WEIGHTS)
    with pytest.raises(CodecError, match=r"decoder\.conv_in\.bias: none: expected shape \[384\]"):
        WanVideoCodec(tmp_path)
    state = made[0].state_dict()
    assert all(value.is_meta for value in state.values())
    assert len(state) == 194 and sum(value.numel() for value in state.values()) == 126_892_531
    for stem, shape in PUBLISHED.items():
        assert state[f"{stem}.weight"].shape == shape and state[f"{stem}.bias"].shape == shape[:1], stem
    assert state["decoder.norm_out.gamma"].shape == (96, 1, 1, 1)
    assert state["encoder.mid_block.attentions.0.norm.gamma"].shape == (384, 1, 1)


def test_latents_are_the_mode_that_diffusers_computes(folder: Path, codec: WanVideoCodec) -> None:
    pixels = noise(9)
    vae = diffusers.AutoencoderKLWan.from_pretrained(folder, local_files_only=True).eval()
    values = torch.from_numpy(pixels).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(values).latent_dist
        picture = vae.decode(posterior.mode()).sample[0].permute(1, 2, 3, 0)
    found = codec.encode(pixels)
    assert found.shape == (3, 16, 4, 6) and found.dtype == torch.float32 and found.std() > 0.5
    assert torch.equal(found, posterior.mode()[0].transpose(0, 1))
    decoded = codec.decode(found)
    assert decoded.shape == pixels.shape and decoded.dtype == np.uint8 and 20 < decoded.std() < 100
    assert np.array_equal(decoded, ((picture + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy())


def test_a_prefix_of_the_pictures_has_the_same_latents(codec: WanVideoCodec) -> None:
    pixels = noise(17)
    whole = codec.encode(pixels)
    for frames in (1, 2, 4):
        assert torch.equal(codec.encode(pixels[: 1 + 4 * (frames - 1)]), whole[:frames])


@pytest.mark.parametrize("changed", [0, 1, 4, 5, 12])
def test_latents_do_not_see_the_future(codec: WanVideoCodec, changed: int) -> None:
    """Latent frame ceil(p / 4) is the first that pixel frame p may change, and it does."""
    pixels = noise(17)
    other = pixels.copy()
    other[changed] = 255 - other[changed]
    a, b = codec.encode(pixels), codec.encode(other)
    first = -(-changed // 4)
    assert torch.equal(a[:first], b[:first]) and not torch.equal(a[first], b[first])


def test_the_reference_is_the_first_latent(codec: WanVideoCodec) -> None:
    pixels = noise(9)
    alone = codec.encode_image(pixels[0])
    assert alone.shape == (16, 4, 6) and torch.equal(alone, codec.encode(pixels)[0])
    assert not torch.equal(alone, codec.encode_image(pixels[1]))


@pytest.mark.parametrize("pieces", [(1, 1, 1, 1, 1, 1, 1), (1, 3, 3), (4, 3), (2, 0, 5)])
def test_decoding_in_pieces_equals_decoding_at_once(codec: WanVideoCodec, pieces: tuple[int, ...]) -> None:
    latents = torch.randn(7, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    decoder, whole = codec.decoder(), codec.decode(latents)
    found = [decoder.decode(part) for part in latents.split(pieces)]
    assert [len(part) for part in found] == [4 * n - 3 * (i == 0) for i, n in enumerate(pieces)]
    assert np.array_equal(np.concatenate(found), whole)
    assert not np.array_equal(codec.decode(latents[3:])[1:], whole[13:])  # what came before does matter


def test_clips_decoded_at_the_same_time_do_not_meet(codec: WanVideoCodec) -> None:
    a, b = torch.randn(2, 5, 16, 4, 6, generator=torch.Generator().manual_seed(1))
    first, second = codec.decoder(), codec.decoder()
    parts = [(first.decode(x), second.decode(y)) for x, y in zip(a.split(1), b.split(1), strict=True)]
    for number, clip in enumerate((a, b)):
        assert np.array_equal(np.concatenate([part[number] for part in parts]), codec.decode(clip))


def test_windows_are_coded_alone(codec: WanVideoCodec) -> None:
    """Whatever was coded before: nothing is kept between clips."""
    pixels = noise(9, seed=3)
    before = codec.encode(pixels)
    codec.encode(noise(5, 16, 16))
    codec.decode(before)
    assert torch.equal(codec.encode(pixels), before)


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_wan, "TILE_ABOVE", 64 * 64)
    monkeypatch.setattr(video_wan, "TILE", 64)
    monkeypatch.setattr(video_wan, "TILE_STRIDE", 48)


def test_large_pictures_are_coded_in_tiles(folder: Path, codec: WanVideoCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 64 for 512, to be quick: as diffusers computes it, streaming, and other than without tiles."""
    pixels = noise(5, 64, 96)
    plain, unlike = codec.encode(pixels), codec.decode(codec.encode(pixels))
    small_tiles(monkeypatch)
    vae = diffusers.AutoencoderKLWan.from_pretrained(folder, local_files_only=True).eval()
    vae.enable_tiling(64, 64, 48, 48)
    values = torch.from_numpy(pixels).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        mode = vae.encode(values).latent_dist.mode()
        picture = vae.decode(mode).sample[0].permute(1, 2, 3, 0)
    latents = codec.encode(pixels)
    assert torch.equal(latents, mode[0].transpose(0, 1)) and not torch.equal(latents, plain)
    whole = codec.decode(latents)
    assert np.array_equal(whole, ((picture + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy())
    assert not np.array_equal(whole, unlike)
    decoder = codec.decoder()
    assert np.array_equal(np.concatenate([decoder.decode(part) for part in latents.split(1)]), whole)
    assert torch.equal(codec.encode_image(pixels[0]), latents[0])
    assert codec.coded(64, 96) == {"dtype": "float32", "tiled": True}
    # The next small clip is coded without tiles again.
    assert codec.encode(noise(1, 64, 64)).shape == (1, 16, 8, 8) and not codec._vae.use_tiling


def test_what_is_tiled() -> None:
    assert not tiled(1024, 1024) and tiled(1024, 1040) and not tiled(512, 512)


def test_bfloat16_is_close_and_said(folder: Path, codec: WanVideoCodec) -> None:
    half, pixels = WanVideoCodec(folder, dtype=torch.bfloat16), noise(5)
    a, b = codec.encode(pixels), half.encode(pixels)
    assert b.dtype == torch.float32 and half.tag == codec.tag
    # 8 bits of mantissa through some twenty layers.
    assert 0 < (a - b).norm() / a.norm() < 0.05
    assert half.coded(32, 48) == {"dtype": "bfloat16", "tiled": False}
    assert codec.coded(32, 48) == {"dtype": "float32", "tiled": False}
    assert np.abs(half.decode(b).astype(int) - codec.decode(a)).mean() < 5


def test_the_tag_names_the_weights(folder: Path, codec: WanVideoCodec, tmp_path: Path) -> None:
    other = WanVideoCodec(write_wan_vae(tmp_path / "other", seed=5)).tag
    assert codec.tag.startswith("wan2.1-4x8x8-16-") and codec.tag.endswith("-v1") and codec.tag != other
    assert video_codec(codec.tag, folder).tag == video_codec_in(folder).tag == codec.tag
    assert video_codec(video_dct.TAG).tag == video_codec_in(None).tag == video_dct.TAG
    with pytest.raises(CodecError, match=f"other: is '{other}': expected '{codec.tag}'"):
        video_codec(codec.tag, tmp_path / "other")
    with pytest.raises(CodecError, match="needs --video-codec DIR"):
        video_codec(codec.tag)
    with pytest.raises(CodecError, match="not used: expected none, as the video codec is 'dct"):
        video_codec(video_dct.TAG, folder)
    with pytest.raises(CodecError, match=r"'wan2.2-4x16x16-48-x-v1': unknown; expected 'dct.*wan2.1"):
        video_codec("wan2.2-4x16x16-48-x-v1", folder)


def test_a_pipeline_folder_will_do(folder: Path, codec: WanVideoCodec, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    assert WanVideoCodec(tmp_path).tag == codec.tag


def test_loading_draws_nothing_and_keeps_no_graph(folder: Path) -> None:
    torch.manual_seed(7)
    codec = WanVideoCodec(folder)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(3))
    assert not any(parameter.requires_grad for parameter in codec._vae.parameters())


def broken(folder: Path, to: Path, case: str) -> Path:
    shutil.copytree(folder, to)
    config, weights = to / CONFIG, to / WEIGHTS
    changes: dict[str, Any] = {
        "wan2.2": {"z_dim": 48, "base_dim": 160, "is_residual": True, "patch_size": 2},
        "residual": {"is_residual": True},
        "time": {"temperal_downsample": [True, True, True]},
        "class": {"_class_name": "AutoencoderKL"},
        "width": {"base_dim": 16},
        "no width": {"base_dim": None},
        "giant": {"base_dim": 10**12},
    }
    if case in changes:
        config.write_text(json.dumps(json.loads(config.read_text()) | changes[case]))
    elif case == "config":
        config.write_text("[1]")
    elif case == "no config":
        config.unlink()
    elif case == "weights":
        weights.rename(to / "diffusion_pytorch_model.bin")
    elif case == "damaged":
        weights.write_bytes(b"\xff" * 100)
    elif case == "truncated":
        weights.write_bytes(weights.read_bytes()[:-4])
    elif case == "missing":
        save_file({k: v for k, v in load_file(weights).items() if k != "quant_conv.bias"}, weights)
    elif case == "more":
        save_file(load_file(weights) | {"quant_conv.scale": torch.zeros(1)}, weights)
    return to


CASES = [
    ("wan2.2", r"config.json: z_dim = 48: expected 16"),
    ("residual", r"is_residual = True: expected False"),
    ("time", r"temperal_downsample = \[True, True, True\]: expected \[False, True, True\]"),
    ("class", r"_class_name = 'AutoencoderKL': expected 'AutoencoderKLWan'"),
    ("width", r"decoder.conv_in.bias: shape \[32\]: expected shape \[64\]"),
    ("no width", r"base_dim = None: expected a whole number"),
    ("giant", r"base_dim = 1000000000000: expected a whole number of 1 to 1024"),
    ("config", r"config.json: expected a JSON object, found list"),
    ("no config", r"config.json: no such file"),
    ("weights", r"no weights: expected diffusion_pytorch_model.safetensors"),
    ("damaged", r"cannot be read as safetensors"),
    ("truncated", r"cannot be read as safetensors"),
    ("missing", r"quant_conv.bias: none: expected shape \[32\]"),
    ("more", r"quant_conv.scale: shape \[1\]: expected none"),
]


@pytest.mark.parametrize(("case", "named"), CASES, ids=[case for case, _ in CASES])
def test_another_folder_is_one_line(folder: Path, tmp_path: Path, case: str, named: str) -> None:
    with pytest.raises((CodecError, ConfigError), match=named) as caught:
        WanVideoCodec(broken(folder, tmp_path / "folder", case))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_without_diffusers_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(video_wan.importlib, "import_module", absent)
    with pytest.raises(CodecError, match="install the extra `wan`"):
        WanVideoCodec(folder)


@pytest.mark.parametrize(
    "pixels",
    [noise(8), noise(9, 30, 48), noise(9)[0], noise(9).astype(np.float32), noise(9)[..., :2]],
    ids=["8 frames", "height 30", "no time", "float", "2 colours"],
)
def test_bad_pixels(codec: WanVideoCodec, pixels: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        codec.encode(pixels)


def test_bad_latents(codec: WanVideoCodec) -> None:
    decoder = codec.decoder()
    with pytest.raises(ValueError, match=r"expected \[F,16,h,w\]"):
        decoder.decode(torch.zeros(2, 12, 4, 4))
    decoder.decode(torch.zeros(1, 16, 4, 4))
    with pytest.raises(ValueError, match="latents of 4 x 6: expected 4 x 4, as before"):
        decoder.decode(torch.zeros(1, 16, 4, 6))


def test_nothing_is_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refused(*_: Any) -> None:
        raise AssertionError(f"a connection was tried in {threading.current_thread().name}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    assert WanVideoCodec(folder).channels == 16
