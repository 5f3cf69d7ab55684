"""insightface's detectors from a file: boxes at known places through its own letterbox, decoding and suppression of
doubles, and one line for every file that is none. The network is made here (helpers/blob_detector.py)."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("insightface")

from helpers.blob_detector import POINTS, blob_detector  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from dualforce.codecs import onnx_file  # noqa: E402
from dualforce.codecs.face_landmarker import TAG  # noqa: E402
from dualforce.codecs.face_retina import RetinaFaceModel, find_detector  # noqa: E402
from dualforce.codecs.protocols import CodecError, Pixels  # noqa: E402
from dualforce.codecs.registry import face_finder  # noqa: E402

Box = tuple[int, int, int, int]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing here may ask for a model; insightface keeps what it fetches below the home folder."""

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture(scope="module")
def detector_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return blob_detector(tmp_path_factory.mktemp("detector") / "det_test.onnx")


def picture(width: int, height: int, *boxes: Box) -> Pixels:
    """Grey, with a red rectangle (a face, to the network) in each box."""
    pixels = np.full((height, width, 3), 90, np.uint8)
    for x0, y0, x1, y1 in boxes:
        pixels[y0:y1, x0:x1] = (255, 0, 0)
    return pixels


@pytest.mark.parametrize(
    "kind", [{}, {"batched": True}, {"anchors": 1}, {"size": (640, 640)}, {"size": (640, 384)}], ids=str
)
@pytest.mark.parametrize(
    ("width", "height", "box", "odd"),
    [
        (640, 640, (100, 120, 260, 310), 0),
        (960, 540, (300, 100, 450, 290), 0),  # wide: the letterbox has its free space below
        (540, 960, (51, 403, 240, 655), 0),  # tall: on the right
        (1920, 1080, (700, 200, 1300, 900), 0),
        (96, 80, (20, 20, 60, 64), 0),  # smaller than the network's input
        (1001, 333, (900, 40, 1001, 163), 4.3),  # the box ends with the picture; insightface takes the scale of
        # both axes from the height of 212.9 pixels that it rounds down to 212: 0.4 % too wide
    ],
)
def test_one_face(tmp_path: Path, kind: dict, width: int, height: int, box: Box, odd: float) -> None:
    model = RetinaFaceModel(blob_detector(tmp_path / "det_test.onnx", **kind))
    (face,) = model.faces(picture(width, height, box))
    pixel = max(width / 640, height / kind.get("size", (640, 640))[1], 0.25)  # of the network, in those of the picture
    near = 1.2 * pixel + odd
    assert face.box.dtype == np.float64 and np.abs(face.box - box).max() <= near
    x0, y0, x1, y1 = box
    points = [(x0 + x * (x1 - x0), y0 + y * (y1 - y0)) for x, y in POINTS]
    assert face.points.shape == (5, 2) and np.abs(face.points - points).max() <= near
    assert 0.5 <= face.score <= 1


def test_several_faces_the_largest_first(detector_file: Path) -> None:
    boxes = [(40, 30, 130, 140), (200, 200, 420, 470), (640, 520, 760, 700)]
    faces = RetinaFaceModel(detector_file).faces(picture(960, 720, *boxes))
    assert len(faces) == 3
    for face, box in zip(faces, (boxes[1], boxes[2], boxes[0]), strict=True):
        assert np.abs(face.box - box).max() <= 1.8


def test_the_coarse_strides_of_retinaface_are_read(tmp_path: Path) -> None:
    """Of this height on the stride of 64, and larger than the three strides reach on the next."""
    model = RetinaFaceModel(blob_detector(tmp_path / "retinaface_r50.onnx", anchors=1, size=(1280, 1280)))
    for box in ((200, 300, 700, 850), (100, 120, 1130, 1200)):
        (face,) = model.faces(picture(1280, 1280, box))
        assert np.abs(face.box - box).max() <= 1.5


def test_a_face_that_fills_the_picture_is_found_at_the_small_size(tmp_path: Path, detector_file: Path) -> None:
    full = picture(512, 512, (0, 0, 512, 512))
    (face,) = RetinaFaceModel(detector_file).faces(full)
    assert np.abs(face.box - (0, 0, 512, 512)).max() <= 4
    assert RetinaFaceModel(blob_detector(tmp_path / "fixed.onnx", size=(640, 640))).faces(full) == []


@pytest.mark.parametrize("colour", [(0, 0, 255), (255, 255, 255), (90, 90, 90)])
def test_no_face(detector_file: Path, colour: tuple[int, int, int]) -> None:
    """Blue is red to a reader that swaps the channels."""
    pixels = picture(320, 240)
    pixels[60:160, 80:180] = colour
    assert RetinaFaceModel(detector_file).faces(pixels) == []


@pytest.mark.parametrize(("width", "height"), [(1, 1), (4000, 3), (2, 4000), (640, 5), (128, 1)])
def test_odd_pictures_have_no_face(detector_file: Path, width: int, height: int) -> None:
    assert RetinaFaceModel(detector_file).faces(picture(width, height)) == []


def test_the_same_picture_gives_the_same_boxes_and_is_left_alone(detector_file: Path) -> None:
    pixels = picture(500, 400, (100, 100, 220, 260))
    pixels.flags.writeable = False
    first, second = (RetinaFaceModel(detector_file).faces(pixels) for _ in range(2))
    assert (first[0].box == second[0].box).all() and first[0].score == second[0].score


def test_boxes_without_area_are_no_faces(tmp_path: Path) -> None:
    model = RetinaFaceModel(blob_detector(tmp_path / "turned.onnx", scale=-1.0))
    assert model.faces(picture(640, 640, (100, 120, 260, 310))) == []


def test_tag_names_the_weights(tmp_path: Path, detector_file: Path) -> None:
    copy = tmp_path / "scrfd_copy.onnx"
    copy.write_bytes(detector_file.read_bytes())
    one, two = RetinaFaceModel(detector_file), RetinaFaceModel(tmp_path)
    other = RetinaFaceModel(blob_detector(tmp_path / "other", scale=1.5))
    assert one.tag == two.tag == f"insightface-detector-{one.weights[:12]}-v1" and len(one.weights) == 64
    assert other.tag != one.tag


def test_detector_of_a_folder(tmp_path: Path) -> None:
    """A model package holds other networks too; names tell."""
    for name in ("1k3d68.onnx", "2d106det.onnx", "det_10g.onnx", "genderage.onnx", "w600k_r50.onnx"):
        (tmp_path / name).touch()
    assert find_detector(tmp_path) == tmp_path / "det_10g.onnx"


def test_finder_of_either_kind(detector_file: Path, landmarker_file: Path) -> None:
    found = face_finder(detector_file, landmarker_file)
    assert isinstance(found, RetinaFaceModel)
    other = face_finder(None, landmarker_file)
    assert other.tag == TAG
    other.close()
    with pytest.raises(CodecError, match="expected --face-landmarker FILE or --face-detector DIR"):
        face_finder(None, None)
    with pytest.raises(CodecError, match=f"is '{found.tag}': expected 'insightface-detector-0-v1'"):
        face_finder(detector_file, None, tag="insightface-detector-0-v1")


def one_line(path: Path, expected: str, **options: str) -> None:
    with pytest.raises(CodecError, match=expected) as caught:
        RetinaFaceModel(path, **options)
    assert "\n" not in str(caught.value)


def test_folders_and_names(tmp_path: Path, detector_file: Path) -> None:
    one_line(tmp_path / "none", r"--face-detector .*none: no such file or folder: expected a folder with det_\*\.onnx")
    one_line(tmp_path, r"holds nothing: expected det_\*\.onnx or scrfd_\*\.onnx or retinaface_\*\.onnx")
    (tmp_path / "w600k_r50.onnx").touch()
    one_line(tmp_path, "holds w600k_r50.onnx: expected det_")
    for name in ("det_10g.onnx", "scrfd_500m.onnx"):
        (tmp_path / name).touch()
    one_line(tmp_path, "holds det_10g.onnx and scrfd_500m.onnx: expected one detector; name the file")
    (tmp_path / "folder" / "det_10g.onnx").mkdir(parents=True)
    one_line(tmp_path / "folder", "holds det_10g.onnx: expected det_")


def network(path: Path, outputs: int, shape: list, kind: int = TensorProto.FLOAT, second: bool = False) -> Path:
    """A network that hands its input on."""
    value = helper.make_tensor_value_info
    names = [f"o{index}" for index in range(outputs)]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["input"], [name]) for name in names], "g",
        [value("input", kind, shape), *([value("more", kind, shape)] if second else [])],
        [value(name, kind, shape) for name in names],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


FREE = [1, 3, "?", "?"]
HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "not an ONNX file"),
    "text": (lambda p: p.write_text("<html>404: not found</html>\n" * 9), "not an ONNX file"),
    "zip": (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(500)), "not an ONNX file"),
    "pickle": (lambda p: p.write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00exit\x85R."), "not an ONNX file"),
    "git-lfs": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "not an ONNX"),
    "cut short": (lambda p: p.write_bytes(blob_detector(p).read_bytes()[:-3000]), "not an ONNX file, or damaged"),
    "recognition": (lambda p: network(p, 1, [None, 3, 112, 112]), "1 output: expected 9 or 15.*another network"),
    "boxes without points": (lambda p: blob_detector(p, outputs=6), "6 outputs: expected 9 or 15"),
    "other shapes": (lambda p: network(p, 9, FREE), r"output 'o0': shape \(1, 3, 128, 128\).*expected \(512, 1\)"),
    "two inputs": (lambda p: network(p, 9, FREE, second=True), "expected one float picture"),
    "half": (lambda p: network(p, 9, FREE, TensorProto.FLOAT16), "expected one float picture"),
    "flat": (lambda p: network(p, 9, [1, 3, "?"]), "expected one float picture"),
    "batch of 2": (lambda p: network(p, 9, [2, 3, "?", "?"]), "expected one float picture"),
    "one channel": (lambda p: network(p, 9, [1, 1, "?", "?"]), "expected one float picture"),
    "odd size": (lambda p: network(p, 9, [1, 3, 100, 100]), "multiples of 32 up to 4096"),
    "giant": (lambda p: network(p, 9, [1, 3, 320000, 320000]), "multiples of 32 up to 4096"),
    "half fixed": (lambda p: network(p, 9, [1, 3, 640, "?"]), "expected free height and width"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_are_no_detector(tmp_path: Path, name: str) -> None:
    make, expected = HOSTILE[name]
    path = tmp_path / "det_10g.onnx"
    make(path)
    one_line(path, f"--face-detector .*det_10g.onnx: .*{expected}")


@pytest.mark.parametrize("place", ["../secret.bin", "/etc/hostname", "beside.bin"])
@pytest.mark.parametrize("where", ["weight", "node", "subgraph"])
def test_weights_in_other_files_are_refused(tmp_path: Path, place: str, where: str) -> None:
    """An initialiser, a constant, and a constant inside a branch, whose bytes lie elsewhere."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (tmp_path / "secret.bin", folder / "beside.bin"):
        file.write_bytes(bytes(4000))
    path = blob_detector(folder / "det_10g.onnx")
    model = onnx.ModelProto.FromString(path.read_bytes())
    tensor = numpy_helper.from_array(np.zeros(9, np.float32), "stolen")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)
    node = helper.make_node("Constant", [], ["stolen"], value=tensor)
    if where == "weight":
        model.graph.initializer.append(tensor)
    elif where == "node":
        model.graph.node.append(node)
    else:
        branch = helper.make_graph([node], "b", [], [helper.make_tensor_value_info("stolen", TensorProto.FLOAT, [9])])
        model.graph.node.append(helper.make_node("If", ["yes"], ["x"], then_branch=branch, else_branch=branch))
    path.write_bytes(model.SerializeToString())
    one_line(path, f"weight 'stolen' lies in another file, '{place}': expected all weights inside")


def test_a_file_that_is_too_large(tmp_path: Path, detector_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "MAX_BYTES", detector_file.stat().st_size - 1)
    one_line(detector_file, "bytes: expected a detector's ONNX file")
    monkeypatch.setattr(onnx_file, "MAX_BYTES", detector_file.stat().st_size)
    RetinaFaceModel(detector_file)


def test_a_network_that_gives_nan_is_not_one_that_saw_no_face(tmp_path: Path) -> None:
    path = blob_detector(tmp_path / "det_nan.onnx")
    model = onnx.ModelProto.FromString(path.read_bytes())
    for node in model.graph.node:  # log of the red share in place of the score: -inf on black, NaN below
        if node.op_type == "Clip":
            node.op_type = "Log"
            del node.input[1:]
    path.write_bytes(model.SerializeToString())
    one_line(path, "NaN or infinity: expected finite values")


def test_unknown_operators_are_one_line(tmp_path: Path) -> None:
    path = network(tmp_path / "det_10g.onnx", 9, FREE)
    model = onnx.ModelProto.FromString(path.read_bytes())
    model.graph.node[0].op_type = "Nonsense"
    path.write_bytes(model.SerializeToString())
    one_line(path, "det_10g.onnx: not a usable network: .*Nonsense")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:", "cpu:0", ""])
def test_unknown_devices(detector_file: Path, device: str) -> None:
    one_line(detector_file, "expected cpu, cuda or cuda:N", device=device)


def test_cuda_is_never_replaced_by_the_cpu(detector_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    one_line(detector_file, "onnxruntime has no CUDA: pip install onnxruntime-gpu", device="cuda:0")


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_cuda_that_does_not_start_is_said(detector_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime goes on with the CPU when a GPU it was asked for is not there."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime has CUDA here")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    one_line(detector_file, "could not start CUDA|CUDAExecutionProvider", device="cuda")


@pytest.mark.parametrize("package", ["insightface.model_zoo", "onnx"])
def test_missing_packages_name_the_extra(detector_file: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    one_line(detector_file, r"is not installed: pip install 'dualforce\[faces\]'")
