"""Checkpoints of LivePortrait's motion extractor, DECA and EMOCA: their published keys and shapes, random weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dualforce.codecs.protocols import CodecError

Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, Tensor]


class FaceModels(NamedTuple):
    """Files as published, with random weights."""

    liveportrait: Path
    deca: Path
    emoca: Path


def write_face_models(folder: Path) -> FaceModels:
    files = FaceModels(folder / "motion_extractor.pth", folder / "deca_model.tar", folder / "emoca.ckpt")
    torch.save(random_weights(liveportrait_shapes(), 1), files.liveportrait)
    coarse = random_weights(coder_shapes(236), 2)
    detail = {"layers.0.weight": torch.ones(3, 3)}  # stands for parts that are not used
    torch.save({"E_flame": coarse, "E_detail": detail, "D_detail": detail}, files.deca)
    parts = {"E_flame": coarse, "E_expression": random_weights(coder_shapes(53), 3), "E_detail": detail}
    state = {f"deca.{part}.{name}": x for part, tensors in parts.items() for name, x in tensors.items()}
    torch.save({"epoch": 3, "state_dict": state, "hyper_parameters": {"n_exp": 50}}, files.emoca)
    return files


def liveportrait_shapes() -> Shapes:
    """Every key of `motion_extractor.pth`: ConvNeXt V2 tiny and its heads."""
    shapes: Shapes = {}

    def both(name: str, *shape: int) -> None:
        shapes[f"detector.{name}.weight"], shapes[f"detector.{name}.bias"] = shape, shape[:1]

    widths = (96, 192, 384, 768)
    both("downsample_layers.0.0", 96, 3, 4, 4)
    both("downsample_layers.0.1", 96)
    for i in (1, 2, 3):
        both(f"downsample_layers.{i}.0", widths[i - 1])
        both(f"downsample_layers.{i}.1", widths[i], widths[i - 1], 2, 2)
    for i, (depth, width) in enumerate(zip((3, 3, 9, 3), widths, strict=True)):
        for j in range(depth):
            block = f"stages.{i}.{j}"
            both(f"{block}.dwconv", width, 1, 7, 7)
            both(f"{block}.norm", width)
            both(f"{block}.pwconv1", 4 * width, width)
            shapes[f"detector.{block}.grn.gamma"] = shapes[f"detector.{block}.grn.beta"] = (1, 1, 1, 4 * width)
            both(f"{block}.pwconv2", width, 4 * width)
    both("norm", 768)
    for head, size in {"kp": 63, "scale": 1, "pitch": 66, "yaw": 66, "roll": 66, "t": 3, "exp": 63}.items():
        both(f"fc_{head}", size, 768)
    return shapes


def coder_shapes(codes: int) -> Shapes:
    """Every key of `E_flame` or `E_expression`: torchvision's ResNet-50 without classifier, and two linear layers."""
    shapes: Shapes = {"encoder.conv1.weight": (64, 3, 7, 7)}

    def norm(name: str, width: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"encoder.{name}.{part}"] = (width,)
        shapes[f"encoder.{name}.num_batches_tracked"] = ()

    norm("bn1", 64)
    width = 64
    for layer, (blocks, inner) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1):
        for block in range(blocks):
            name = f"layer{layer}.{block}"
            shapes[f"encoder.{name}.conv1.weight"] = (inner, width, 1, 1)
            shapes[f"encoder.{name}.conv2.weight"] = (inner, inner, 3, 3)
            shapes[f"encoder.{name}.conv3.weight"] = (4 * inner, inner, 1, 1)
            for bn, size in (("bn1", inner), ("bn2", inner), ("bn3", 4 * inner)):
                norm(f"{name}.{bn}", size)
            if block == 0:
                shapes[f"encoder.{name}.downsample.0.weight"] = (4 * inner, width, 1, 1)
                norm(f"{name}.downsample.1", 4 * inner)
            width = 4 * inner
    shapes |= {"layers.0.weight": (1024, 2048), "layers.0.bias": (1024,)}
    shapes |= {"layers.2.weight": (codes, 1024), "layers.2.bias": (codes,)}
    return shapes


def random_weights(shapes: Shapes, seed: int) -> Tensors:
    """Weights at which signals keep their size and every parameter matters to the output."""
    source = torch.Generator().manual_seed(seed)
    made: Tensors = {}
    for name, shape in shapes.items():
        kind = name.rsplit(".", 1)[1]
        if kind == "num_batches_tracked":
            made[name] = torch.tensor(1000)
        elif kind == "running_var" or (kind == "weight" and len(shape) == 1):
            made[name] = 0.5 + torch.rand(shape, generator=source)
        elif kind == "weight":
            made[name] = torch.randn(shape, generator=source) * math.sqrt(2 / math.prod(shape[1:]))
        else:
            made[name] = 0.2 * torch.randn(shape, generator=source)
    return made


def hollow(shapes: Shapes) -> Tensors:
    """Zeros of these shapes that take no room: files for tests in which the values do not matter."""
    return {name: torch.tensor(0 if name.endswith("tracked") else 0.0).expand(shape) for name, shape in shapes.items()}


def assert_refused(load: Callable[[Path], object], path: Path, message: str) -> None:
    """A checkpoint that cannot be used is one line that names it."""
    with pytest.raises(CodecError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
