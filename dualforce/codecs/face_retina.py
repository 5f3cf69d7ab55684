"""Faces by a detector of insightface, SCRFD or RetinaFace: the one file that imports `insightface` and `onnxruntime`.

The ONNX file (`det_10g.onnx`, `det_500m.onnx`, `scrfd_*.onnx`, `retinaface_*.onnx`) is given by path, or by the folder
of a model package such as buffalo_l, and never downloaded: insightface's `FaceAnalysis`, which does that, is not used.
The published models are for non-commercial research.

Published layout (Guo et al. 2021, arXiv 2105.04714): input [1,3,H,W] RGB, (value - 127.5) / 128; for each stride the
scores [N,1], box distances [N,4] and key point offsets [N,10] of N = H/stride * W/stride * anchors, in units of the
stride. Decoding, letterbox and suppression of doubles are insightface's.

The box: WIDER FACE, which these models are trained on, asks for boxes that tightly contain forehead, chin and cheeks
(Yang et al. 2016, section 3). MediaPipe's landmark box, which `face_box.FACE_SHARE` speaks of, goes by definition from
forehead to chin and from cheek to cheek. By that rule they are the same box, so boxes are handed on as they are. It has
not been measured: a detector whose boxes are k times as large gives crops k times as wide.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dualforce.codecs.onnx_file import read_onnx
from dualforce.codecs.protocols import CodecError, Pixels

PATTERNS = ("det_*.onnx", "scrfd_*.onnx", "retinaface_*.onnx")
OPTION = "--face-detector"
VERSION = "v1"
# Picture edges a model of free size is run at, insightface's own pair: at the small one a face that fills the picture
# is as large as those the model was trained on.
SIDES = (128, 640)
MAX_SIDE = 4096
SCORE = 0.5  # insightface's own least score
WIDTHS = (1, 4, 10)  # of scores, box distances, key point offsets


class DetectedFace(NamedTuple):
    """One face: its box (x0, y0, x1, y1) [4] float64 in pixels, which may reach outside the picture; the key points
    [5,2] float64 (x, y): the two eyes, nose, the two mouth corners, in each pair the one further left in the picture
    first; the score in [0.5, 1]."""

    box: NDArray[np.float64]
    points: NDArray[np.float64]
    score: float


class _Layout(NamedTuple):
    """Strides and anchors per place of a detector's outputs."""

    strides: tuple[int, ...]
    anchors: int


LAYOUTS = {9: _Layout((8, 16, 32), 2), 15: _Layout((8, 16, 32, 64, 128), 1)}  # by number of outputs


class RetinaFaceModel:
    """A loaded detector. `weights` is the SHA-256 of its file, `tag` names it. Pictures are looked at one by one: the
    published files have a batch of 1. Use as a context manager, or call `close`."""

    package = "insightface"

    def __init__(self, path: Path, device: str = "cpu") -> None:
        """`path`: the ONNX file, or a folder with one detector in it. `device`: "cpu", "cuda" or "cuda:N".

        Raises CodecError when there is none, more than one or another network, when the device cannot be used, and
        without insightface (extra `faces`).
        """
        self.file = find_detector(path)
        data = read_onnx(self.file, OPTION)
        self.weights = hashlib.sha256(data).hexdigest()
        self.tag = f"insightface-detector-{self.weights[:12]}-{VERSION}"
        try:
            from insightface.model_zoo import SCRFD
        except ImportError as error:
            raise CodecError("insightface is not installed: pip install 'dualforce[faces]'") from error
        session = _session(self.file, data, device)
        sides = _checked_sides(self.file, session)
        self._least = min(edge for side in sides for edge in side)
        checked = _CheckedSession(self.file, session)
        self._detector: Any = SCRFD(session=checked)  # it decodes RetinaFace's layout too
        self._detector.prepare(0, input_size=sides, det_thresh=SCORE)
        checked.run(self._detector.output_names, {checked.get_inputs()[0].name: _blank(sides[0])})

    def faces(self, picture: Pixels) -> list[DetectedFace]:
        """Faces in a picture [H,W,3] uint8 RGB, the longest box side first. Raises CodecError when the network fails or
        gives what a detector cannot."""
        height, width = picture.shape[:2]
        if max(height, width) > self._least * min(height, width):
            return []  # a strip that would be thinner than one pixel: no face fits in
        rows, points = self._detector.detect(np.ascontiguousarray(picture[..., ::-1]))
        found = [
            DetectedFace(row[:4].astype(np.float64), five.astype(np.float64), float(row[4]))
            for row, five in zip(rows, points, strict=True)
            if row[2] > row[0] and row[3] > row[1]
        ]
        return sorted(found, key=lambda face: -float(np.max(face.box[2:] - face.box[:2])))

    def close(self) -> None:
        self._detector = None

    def __enter__(self) -> RetinaFaceModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def find_detector(path: Path) -> Path:
    """The detector's ONNX file: `path` itself, or the one in the folder `path`. Raises CodecError."""
    wanted = " or ".join(PATTERNS)
    if path.is_file():
        return path
    if not path.is_dir():
        raise CodecError(f"{OPTION} {path}: no such file or folder: expected a folder with {wanted}, or the file")
    found = sorted(file for pattern in PATTERNS for file in path.glob(pattern) if file.is_file())
    if not found:
        others = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
        raise CodecError(f"{OPTION} {path}: holds {others}: expected {wanted}")
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        raise CodecError(f"{OPTION} {path}: holds {names}: expected one detector; name the file")
    return found[0]


class _CheckedSession:
    """An onnxruntime session whose results are what a detector gives, or an error: insightface takes shapes on trust,
    and a NaN for no face."""

    def __init__(self, file: Path, session: Any) -> None:
        self._file, self._session = file, session

    def run(self, names: list[str], feeds: dict[str, NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        try:
            outputs: list[NDArray[np.float32]] = self._session.run(names, feeds)
        except Exception as error:  # onnxruntime's errors have no class of their own
            raise CodecError(f"{OPTION} {self._file}: fails on a picture: {_first_line(error)}") from error
        height, width = next(iter(feeds.values())).shape[2:]
        layout = LAYOUTS[len(outputs)]
        for index, (name, output) in enumerate(zip(names, outputs, strict=True)):
            part, level = divmod(index, len(layout.strides))
            stride = layout.strides[level]
            expected = ((height // stride) * (width // stride) * layout.anchors, WIDTHS[part])
            if output.shape not in (expected, (1, *expected)):
                raise CodecError(
                    f"{OPTION} {self._file}: output {name!r}: shape {output.shape} for {width} x {height} pixels: "
                    f"expected {expected}, as a face detector gives"
                )
            if not np.isfinite(output).all():
                raise CodecError(f"{OPTION} {self._file}: output {name!r}: NaN or infinity: expected finite values")
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def _session(file: Path, data: bytes, device: str) -> Any:
    """An onnxruntime session of the bytes that were checked and hashed."""
    import onnxruntime

    kind, _, number = device.partition(":")
    provider: Any = "CPUExecutionProvider"
    if kind == "cuda" and (number.isdecimal() or device == "cuda"):
        provider = ("CUDAExecutionProvider", {"device_id": number or "0"})
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise CodecError(f"{OPTION}: device {device!r}: onnxruntime has no CUDA: pip install onnxruntime-gpu")
        onnxruntime.preload_dlls()
    elif device != "cpu":
        raise CodecError(f"{OPTION}: device {device!r}: expected cpu, cuda or cuda:N")
    options = onnxruntime.SessionOptions()
    # Workers share the cores among themselves, and with one thread sums keep their order.
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(data, options, providers=[provider])
    except Exception as error:  # onnxruntime's errors have no class of their own
        raise CodecError(f"{OPTION} {file}: not a usable network: {_first_line(error)}") from error
    if kind == "cuda" and "CUDAExecutionProvider" not in session.get_providers():  # it goes on without one, silently
        raise CodecError(f"{OPTION}: device {device!r}: onnxruntime could not start CUDA on it")
    return session


def _checked_sides(file: Path, session: Any) -> list[tuple[int, int]]:
    """(width, height) that the network is run at. Raises CodecError unless inputs and outputs are a face detector's."""
    count = len(session.get_outputs())
    if count not in LAYOUTS:
        raise CodecError(
            f"{OPTION} {file}: {count} output{'s' * (count != 1)}: expected {' or '.join(map(str, LAYOUTS))}, scores, "
            "boxes and key points of a face detector; is it another network?"
        )
    first, *more = session.get_inputs()
    shape, kind = first.shape, first.type
    if more or kind != "tensor(float)" or len(shape) != 4 or not (_may_be(shape[0], 1) and _may_be(shape[1], 3)):
        raise CodecError(f"{OPTION} {file}: input {first.name!r}: {kind} {shape}: expected one float picture [1,3,H,W]")
    if not isinstance(shape[2], int) and not isinstance(shape[3], int):
        return [(side, side) for side in SIDES]
    step = LAYOUTS[count].strides[-1]
    if not all(isinstance(edge, int) and 0 < edge <= MAX_SIDE and edge % step == 0 for edge in shape[2:]):
        raise CodecError(
            f"{OPTION} {file}: input {first.name!r}: {shape}: expected free height and width, or multiples of {step} "
            f"up to {MAX_SIDE}"
        )
    return [(shape[3], shape[2])]


def _may_be(axis: int | str | None, length: int) -> bool:
    """An axis of this length, or of any: those have a name or nothing."""
    return axis == length or not isinstance(axis, int)


def _blank(side: tuple[int, int]) -> NDArray[np.float32]:
    return np.zeros((1, 3, side[1], side[0]), np.float32)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
