"""LivePortrait's motion: the published layout, the arithmetic against transformers, decoding, and order of names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.face_models import FaceModels, Tensors, assert_refused, hollow, liveportrait_shapes
from safetensors.torch import save_file
from torch import nn

from dualforce.codecs.convnextv2 import MotionHeads, MotionNetwork
from dualforce.codecs.face_box import resize
from dualforce.codecs.motion_liveportrait import NAMES, LivePortraitMotion, decoded, degrees
from dualforce.codecs.protocols import CodecError, Pixels
from dualforce.codecs.registry import motion_encoder

HEADS = ("kp", "pitch", "yaw", "roll", "t", "exp", "scale")


def pictures(count: int, size: int = 256, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def encoder(face_models: FaceModels) -> LivePortraitMotion:
    return LivePortraitMotion(face_models.liveportrait, batch=2)


def test_keys_shapes_and_parameters_are_the_published_ones() -> None:
    own = {f"detector.{name}": tuple(x.shape) for name, x in MotionNetwork().state_dict().items()}
    assert own == liveportrait_shapes() and len(own) == 212
    # ConvNeXt V2 tiny has 28,635,496 parameters, 769,000 of them in its classifier; the heads have 328 outputs of 768.
    assert sum(math.prod(shape) for shape in own.values()) == 28_635_496 - 769_000 + 328 * 769


def test_network_is_that_of_transformers(encoder: LivePortraitMotion, face_models: FaceModels) -> None:
    """In float64, where rounding cannot hide or make a difference."""
    weights = torch.load(face_models.liveportrait, weights_only=True)
    weights = {name.removeprefix("detector."): x.double() for name, x in weights.items()}
    network = MotionNetwork().double().eval()
    network.load_state_dict(weights)
    x = torch.rand(2, 3, 256, 256, dtype=torch.float64)
    with torch.inference_mode():
        features = convnext_of_transformers(weights)(x).pooler_output
        found = network(x)
        assert torch.allclose(network.features(x), features, rtol=1e-9, atol=1e-9) and features.std() > 0.1
        for name in HEADS:
            head = features @ weights[f"fc_{name}.weight"].T + weights[f"fc_{name}.bias"]
            assert torch.allclose(getattr(found, name), head, rtol=1e-8, atol=1e-8), name


def convnext_of_transformers(weights: Tensors) -> nn.Module:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.ConvNextV2Config(
        depths=[3, 3, 9, 3], hidden_sizes=[96, 192, 384, 768], image_size=256, layer_norm_eps=1e-6
    )
    with torch.device("meta"):  # saves the drawing of weights
        model = transformers.ConvNextV2Model(config)
    renamed: Tensors = {}
    for name, value in weights.items():
        if name.startswith("fc_"):
            continue
        parts = name.split(".")
        if name.startswith("downsample_layers.0."):
            name = ".".join(["embeddings", ("patch_embeddings", "layernorm")[int(parts[2])], parts[3]])
        elif name.startswith("downsample_layers."):
            name = ".".join(["encoder.stages", parts[1], "downsampling_layer", *parts[2:]])
        elif name.startswith("stages."):
            inner = ".".join(parts[3:]).replace("grn.gamma", "grn.weight").replace("grn.beta", "grn.bias")
            inner = inner.replace("norm.", "layernorm.") if inner.startswith("norm.") else inner
            name = ".".join(["encoder.stages", parts[1], "layers", parts[2], inner])
        else:
            name = name.replace("norm.", "layernorm.")
        renamed[name] = value
    model.load_state_dict(renamed, assign=True)
    return model.double().eval()


def test_motion_is_the_decoded_network_on_the_resized_crop(
    encoder: LivePortraitMotion, face_models: FaceModels
) -> None:
    crops = pictures(3, 320)
    motion = encoder.encode(crops, 25)
    assert motion.shape == (3, 70) and motion.dtype == torch.float32 and len(encoder.names) == encoder.width == 70
    network = MotionNetwork().eval()
    weights = torch.load(face_models.liveportrait, weights_only=True)
    network.load_state_dict({name.removeprefix("detector."): x for name, x in weights.items()})
    with torch.inference_mode():
        for row, crop in zip(motion, crops, strict=True):
            x = torch.from_numpy(resize(crop, 256)).permute(2, 0, 1)[None] / 255
            assert torch.allclose(row, decoded(network(x))[0], rtol=1e-4, atol=1e-3)
    assert (motion[0] - motion[1]).abs().min() > 0
    assert torch.equal(encoder.encode(crops, 25), motion)


def test_angles_against_the_formula() -> None:
    logits = 4 * torch.randn(200, 66)
    wanted = []
    for row in logits.double().tolist():
        weights = [math.exp(value - max(row)) for value in row]
        wanted.append(sum(w * i for i, w in enumerate(weights)) / sum(weights) * 3 - 97.5)
    assert np.allclose(degrees(logits), wanted, rtol=0, atol=1e-4)
    assert degrees(1e4 * torch.eye(66)[[0, 33, 65]]).tolist() == pytest.approx([-97.5, 1.5, 97.5])


def test_names_say_what_the_columns_are() -> None:
    numbers = {name: torch.arange(size, dtype=torch.float32)[None] + 1000 * (i + 1)
               for i, (name, size) in enumerate((("exp", 63), ("scale", 1), ("t", 3)))}  # fmt: skip
    pick = {name: 1e4 * torch.eye(66)[[bin]] for name, bin in (("pitch", 10), ("yaw", 20), ("roll", 30))}
    row = dict(zip(NAMES, decoded(MotionHeads(kp=torch.zeros(1, 63), **numbers, **pick))[0].tolist(), strict=True))
    assert row["exp00x"] == 1000 and row["exp00z"] == 1002 and row["exp20z"] == 1062  # 21 points, x y z each
    assert (row["scale"], row["tx"], row["tz"]) == (2000, 3000, 3002)
    assert (row["pitch"], row["yaw"], row["roll"]) == (-67.5, -37.5, -7.5)


def test_tag_names_the_weights(face_models: FaceModels, tmp_path: Path, encoder: LivePortraitMotion) -> None:
    assert encoder.tag.startswith("liveportrait-70-") and encoder.tag.endswith("-v1")
    weights = torch.load(face_models.liveportrait, weights_only=True)
    save_file(weights, tmp_path / "same.safetensors")
    other = LivePortraitMotion(tmp_path / "same.safetensors")
    assert other.tag != encoder.tag  # another file; its weights are the same
    assert torch.allclose(other.encode(pictures(1), 25), encoder.encode(pictures(1), 25), rtol=1e-5, atol=1e-4)


def test_registry_wants_the_checkpoint_with_this_tag(face_models: FaceModels, encoder: LivePortraitMotion) -> None:
    assert motion_encoder(encoder.tag, None, face_models.liveportrait).tag == encoder.tag
    with pytest.raises(CodecError, match=f"{encoder.tag}.*needs --motion-extractor FILE"):
        motion_encoder(encoder.tag, None)
    with pytest.raises(CodecError, match=r"motion_extractor\.pth: is .*: expected 'liveportrait-70-0-v1'"):
        motion_encoder("liveportrait-70-0-v1", None, face_models.liveportrait)


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (1, 8, 9, 3), (8, 8, 3), (1, 8, 8, 4)])
def test_pictures_of_another_shape_are_refused(encoder: LivePortraitMotion, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[P,H,H,3\]"):
        encoder.encode(np.zeros(shape, np.uint8), 25)


def test_files_of_another_model_are_one_line(tmp_path: Path) -> None:
    whole = hollow(liveportrait_shapes())
    changes: dict[str, tuple[Tensors, str]] = {
        "missing": (
            {name: x for name, x in whole.items() if "stages.2.7" not in name},
            r"detector\.stages\.2\.7\.dwconv\.weight: missing \(10 such\): expected the 212 keys",
        ),
        "unknown": (
            {**whole, "detector.head.weight": torch.zeros(1)},
            r"detector\.head\.weight: unknown \(1 such\): expected the 212 keys",
        ),
        "beside": (
            {**whole, "module.x": torch.zeros(1)},
            r"keys detector\.downsample_layers\.0\.0\.bias, .* and 210 more: expected LivePortrait's .*'detector\.'",
        ),
        "24 points": (
            {**whole, "detector.fc_kp.weight": torch.zeros(1).expand(72, 768)},
            r"detector\.fc_kp\.weight: shape \[72, 768\]: expected \[63, 768\]",
        ),
        "nan": (
            {**whole, "detector.norm.bias": torch.tensor(math.nan).expand(768)},
            r"detector\.norm\.bias: NaN or infinity: expected finite weights",
        ),
        "whole numbers": (
            {**whole, "detector.norm.bias": torch.tensor(1).expand(768)},
            r"detector\.norm\.bias: torch\.int64, .*: expected plain torch\.float32",
        ),
    }
    for name, (tensors, message) in changes.items():
        path = tmp_path / f"{name}.pth"
        torch.save(tensors, path)
        assert_refused(LivePortraitMotion, path, message)
