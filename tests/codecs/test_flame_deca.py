"""FLAME by DECA and EMOCA: the published layout, the arithmetic against transformers, the crop, and what is invalid."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.face_models import FaceModels, Tensors, assert_refused, coder_shapes, hollow
from torch import Tensor, nn

from dualforce.codecs.face_box import square_boxes, square_crop
from dualforce.codecs.flame_deca import CodeEncoder, DecaFlame, deca_squares
from dualforce.codecs.protocols import CodecError, Pixels
from dualforce.codecs.registry import flame_encoder

BOX = np.array([60.0, 50.0, 190.0, 210.0])


def pictures(count: int, size: int = 256, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def boxes(count: int) -> np.ndarray:
    return BOX + np.arange(count)[:, None]


@pytest.fixture(scope="module")
def deca(face_models: FaceModels) -> DecaFlame:
    return DecaFlame(face_models.deca, batch=2)


@pytest.fixture(scope="module")
def emoca(face_models: FaceModels) -> DecaFlame:
    return DecaFlame(face_models.emoca)


def coarse_weights(face_models: FaceModels) -> Tensors:
    weights: Tensors = torch.load(face_models.deca, weights_only=True)["E_flame"]
    return weights


def resnet_of_transformers(weights: Tensors) -> nn.Module:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        depths=[3, 4, 6, 3], hidden_sizes=[256, 512, 1024, 2048], embedding_size=64, layer_type="bottleneck"
    )
    with torch.device("meta"):  # saves the drawing of weights
        model = transformers.ResNetModel(config)
    renamed: Tensors = {}
    for name, value in weights.items():
        parts = name.split(".")
        if parts[0] != "encoder":
            continue
        if parts[1] in ("conv1", "bn1"):
            where = "embedder.embedder"
        else:
            where = f"encoder.stages.{int(parts[1][-1]) - 1}.layers.{parts[2]}"
            where += ".shortcut" if parts[3] == "downsample" else f".layer.{int(parts[3][-1]) - 1}"
        conv = parts[-2].startswith("conv") or parts[-3:-1] == ["downsample", "0"]
        renamed[f"{where}.{'convolution' if conv else 'normalization'}.{parts[-1]}"] = value
    model.load_state_dict(renamed, assign=True)
    return model.double().eval()


def reference(weights: Tensors, crops: Pixels) -> Tensor:
    """The codes [P,n] float64 of crops [P,224,224,3] uint8, by transformers' network."""
    model = resnet_of_transformers(weights)
    wide = {name: x.double() for name, x in weights.items()}
    with torch.inference_mode():
        x = model(torch.from_numpy(crops).permute(0, 3, 1, 2).double() / 255).pooler_output.flatten(1)
        x = (x @ wide["layers.0.weight"].T + wide["layers.0.bias"]).clamp_min(0)
        return x @ wide["layers.2.weight"].T + wide["layers.2.bias"]


def test_keys_shapes_and_parameters_are_the_published_ones() -> None:
    own = {name: tuple(x.shape) for name, x in CodeEncoder(236).state_dict().items()}
    assert own == coder_shapes(236) and len(own) == 322
    trained = {name: shape for name, shape in own.items() if "running" not in name and "tracked" not in name}
    encoder = sum(math.prod(shape) for name, shape in trained.items() if name.startswith("encoder."))
    assert encoder == 25_557_032 - 2049 * 1000  # ResNet-50 without its classifier
    assert sum(math.prod(shape) for shape in trained.values()) == encoder + 2049 * 1024 + 1025 * 236


def test_deca_is_the_code_of_transformers_network(deca: DecaFlame, face_models: FaceModels) -> None:
    given, faces = pictures(3), boxes(3)
    values, valid = deca.encode(given, faces)
    assert values.shape == (3, 56) and values.dtype == torch.float32 and deca.width == len(deca.names) == 56
    assert valid.dtype == torch.bool and valid.all()
    crops = np.stack([square_crop(a, b, 224) for a, b in zip(given, deca_squares(faces), strict=True)])
    code = reference(coarse_weights(face_models), crops)
    # shape 100, texture 50, expression 50, pose 6 (rotation, jaw), camera 3, light 27
    wanted = torch.cat([code[:, 150:200], code[:, 203:206], code[:, 200:203]], dim=1)
    assert torch.allclose(values.double(), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert wanted.std(dim=0).min() > 0
    assert deca.names[:1] + deca.names[49:] == ("exp00", "exp49", "jaw_x", "jaw_y", "jaw_z", "rot_x", "rot_y", "rot_z")


def test_emoca_replaces_expression_and_jaw(deca: DecaFlame, emoca: DecaFlame, face_models: FaceModels) -> None:
    given, faces = pictures(2), boxes(2)
    values = emoca.encode(given, faces).values
    crops = np.stack([square_crop(a, b, 224) for a, b in zip(given, deca_squares(faces), strict=True)])
    state = torch.load(face_models.emoca, weights_only=True)["state_dict"]
    prefix = "deca.E_expression."
    code = reference({n.removeprefix(prefix): x for n, x in state.items() if n.startswith(prefix)}, crops)
    assert torch.allclose(values[:, :53].double(), code, rtol=1e-4, atol=1e-4 * float(code.abs().max()))
    assert torch.equal(values[:, 53:], deca.encode(given, faces).values[:, 53:])
    assert emoca.tag.startswith("emoca-56-") and deca.tag.startswith("deca-56-") and emoca.tag != deca.tag


@pytest.mark.parametrize(("codes", "own"), [(50, 50), (56, 56)])
def test_expression_encoders_of_other_widths(tmp_path: Path, codes: int, own: int) -> None:
    """Of zeros but for the last biases, which show where each number goes."""
    tensors = {f"deca.E_flame.{name}": x for name, x in hollow(coder_shapes(236)).items()}
    tensors |= {f"deca.E_expression.{name}": x for name, x in hollow(coder_shapes(codes)).items()}
    tensors["deca.E_flame.layers.2.bias"] = torch.arange(236.0)
    tensors["deca.E_expression.layers.2.bias"] = 1000 + torch.arange(float(codes))
    torch.save(tensors, tmp_path / "x.pth")
    row = DecaFlame(tmp_path / "x.pth").encode(pictures(1), boxes(1)).values[0].tolist()
    full = [1000.0 + i for i in range(codes)]
    assert row[:50] == full[:50]
    rotation, jaw = ([200.0, 201, 202], [203.0, 204, 205]) if own == 50 else (full[50:53], full[53:56])
    assert row[50:] == jaw + rotation


def test_frames_without_a_face_are_invalid_and_others_as_alone(deca: DecaFlame) -> None:
    given, faces = pictures(5), boxes(5)
    faces[1] = np.nan
    faces[3, 2] = np.inf
    values, valid = deca.encode(given, faces)
    assert valid.tolist() == [True, False, True, False, True]
    assert torch.isfinite(values).all() and not values[~valid].any()
    for index in (0, 2, 4):
        alone = deca.encode(given[index : index + 1], faces[index : index + 1]).values[0]
        assert torch.allclose(values[index], alone, rtol=1e-4, atol=1e-3)
    nobody = deca.encode(given[:2], np.full((2, 4), np.nan))
    assert not nobody.valid.any() and not nobody.values.any()


def test_a_result_that_is_not_finite_is_invalid(tmp_path: Path) -> None:
    tensors = hollow(coder_shapes(236))
    tensors["layers.2.weight"] = torch.tensor(3e38).expand(236, 1024)
    tensors["layers.0.bias"] = torch.ones(1024)
    torch.save({"E_flame": tensors}, tmp_path / "x.tar")
    values, valid = DecaFlame(tmp_path / "x.tar").encode(pictures(2), boxes(2))
    assert not valid.any() and not values.any()


def test_crop_is_that_of_deca() -> None:
    """A box of 100 x 200 from forehead to chin: brows at 28 of 200; around the rest 1.375 times the mean edge."""
    (square,) = deca_squares(np.array([[10.0, 20.0, 110.0, 220.0]]))
    assert square.tolist() == pytest.approx([60, (48 + 220) / 2, 1.375 * (100 + 172) / 2])
    (box,) = square_boxes(deca_squares(BOX[None]))
    assert box[0] < BOX[0] and box[2] > BOX[2] and box[3] > BOX[3]


def test_brows_of_real_faces_are_where_the_crop_takes_them(clips_dir: Path, landmarker_file: Path) -> None:
    """Eyes, as landmarks see them, lie in the upper half of DECA's crop, mouth and chin in the lower, all inside."""
    from dualforce.codecs.face_landmarker import FaceLandmarkerModel
    from dualforce.codecs.media import read_video

    picture = read_video(clips_dir / "video" / "man_interview_6s.mp4", stop=1).frames[0]
    with FaceLandmarkerModel(landmarker_file, video=False) as landmarker:
        (square,) = deca_squares(landmarker.faces(picture)[0].box[None])
        again = landmarker.faces(square_crop(picture, square, 224))[0].box
    assert again[0] > 0 and again[2] < 224 and 0 < 224 - again[3] < 224 * 0.2
    assert 0.6 < (again[2] - again[0]) / 224 < 0.85


def test_wrong_arguments(deca: DecaFlame) -> None:
    for given, faces in ((pictures(2), boxes(3)), (pictures(1)[:0], boxes(0))):
        with pytest.raises(ValueError, match="expected equal numbers of at least 1"):
            deca.encode(given, faces)
    with pytest.raises(ValueError, match="crop side"):
        deca.encode(pictures(1), np.zeros((1, 4)))


def test_registry_wants_the_tag(face_models: FaceModels, deca: DecaFlame) -> None:
    assert flame_encoder(face_models.deca).tag == flame_encoder(face_models.deca, deca.tag).tag == deca.tag
    with pytest.raises(CodecError, match=r"--flame-encoder .*deca_model\.tar: is .*: expected 'deca-56-0-v1'"):
        flame_encoder(face_models.deca, "deca-56-0-v1")


def test_classifier_of_torchvision_is_left_out(tmp_path: Path) -> None:
    tensors = hollow(coder_shapes(236)) | {"encoder.fc.weight": torch.zeros(1000, 2048)}
    torch.save({"E_flame": tensors}, tmp_path / "x.tar")
    assert DecaFlame(tmp_path / "x.tar").width == 56


def test_files_of_another_layout_are_one_line(tmp_path: Path, face_models: FaceModels) -> None:
    flame, expression = hollow(coder_shapes(236)), hollow(coder_shapes(50))
    lost = {name: x for name, x in flame.items() if not name.startswith("encoder.layer3.5.bn2")}
    swin = {"backbone.x": torch.zeros(1), "layers.2.bias": torch.zeros(236)}
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "other": ({"net": swin}, r"keys net\.backbone\.x, net\.layers\.2\.bias: expected DECA's or EMOCA's"),
        "no bn": ({"E_flame": lost}, r"E_flame\.encoder\.layer3\.5\.bn2\.weight: missing \(5 such\): expected the 322"),
        "swin": ({"E_flame": swin}, r"E_flame\.encoder\.conv1\.weight: missing \(321 such\)"),
        "codes": (
            {"E_flame": {**flame, "layers.2.weight": torch.zeros(1).expand(286, 1024)}},
            r"E_flame\.layers\.2\.weight: shape \[286, 1024\]: expected \[236, 1024\]",
        ),
        "expression": (
            {"E_flame": flame, "E_expression": {**expression, "layers.2.bias": torch.zeros(100)}},
            r"E_expression\.layers\.2\.bias: 100 numbers, keys encoder\.bn1\.bias, .*: expected \(50, 53, 56\)",
        ),
        "second head": (
            {"E_flame": flame, "E_expression": {"resnet.conv1.weight": torch.zeros(1)}},
            r"E_expression\.layers\.2\.bias: None numbers, keys resnet\.conv1\.weight: expected",
        ),
        "inf": (
            {"E_flame": {**flame, "encoder.bn1.running_var": torch.tensor(math.inf).expand(64)}},
            r"E_flame\.encoder\.bn1\.running_var: NaN or infinity",
        ),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / f"{name}.tar"
        torch.save(content, path)
        assert_refused(DecaFlame, path, message)
    with pytest.raises(CodecError, match=r"keys detector\..*: expected DECA's or EMOCA's"):
        DecaFlame(face_models.liveportrait)
