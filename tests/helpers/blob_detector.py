"""An ONNX network with the inputs and outputs of SCRFD's published files whose arithmetic finds red rectangles.

Red (red minus the mean of green and blue) is pooled to cells of a stride. Where a cell is red throughout, sums of the
cells on either side of it along its row and column are the distances to the rectangle's edges, to a fraction of a pixel
and in units of the stride: what a detector's box head gives. Scores fall with the distance from the middle and are
higher in larger pictures; several cells of a rectangle pass the threshold, for the suppression of doubles to do.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

STRIDES = {2: (8, 16, 32), 1: (8, 16, 32, 64, 128)}  # by anchors per cell
REACH = 80  # cells looked at on each side
# Key points as shares of the box: the eyes, the nose, the corners of the mouth.
POINTS = ((0.3, 0.35), (0.7, 0.35), (0.5, 0.6), (0.35, 0.8), (0.65, 0.8))


class _Graph:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, kind: str, *inputs: str | float | list | np.ndarray, name: str | None = None, **attributes) -> str:
        names = [value if isinstance(value, str) else self.constant(value) for value in inputs]
        output = name or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, names, [output], **attributes))
        return output

    def constant(self, value: float | list | np.ndarray) -> str:
        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype.kind == "f" else array.astype(np.int64)
        self.constants.append(numpy_helper.from_array(array, f"c{len(self.constants)}"))
        return self.constants[-1].name


def blob_detector(
    path: Path,
    *,
    size: tuple[int, int] | None = None,
    batched: bool = False,
    anchors: int = 2,
    outputs: int | None = None,
    scale: float = 1.0,
) -> Path:
    """Write the network to `path`. `size`: fixed (width, height) of its input, else free; `batched`: outputs [1,N,C],
    as some published files have, else [N,C]; `anchors` per cell: 2 with three strides, SCRFD's layout, or 1 with five,
    RetinaFace's; `outputs`: the first so many (None: all); `scale` multiplies the boxes it gives."""
    graph = _Graph()
    mask = _red(graph, "picture")
    strides = STRIDES[anchors]
    heads = [_heads(graph, mask, stride, strides, scale) for stride in strides]
    results = []
    for part, width in enumerate((1, 4, 10)):
        for stride, head in zip(strides, heads, strict=True):
            name = f"{('score', 'box', 'points')[part]}_{stride}"
            shape = [1, -1, width] if batched else [-1, width]
            graph.add("Reshape", head[part], shape, name=name)
            results.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, None, width][not batched :]))
    edges = [size[1], size[0]] if size else ["?", "?"]
    entry = helper.make_tensor_value_info("picture", TensorProto.FLOAT, [1, 3, *edges])
    model = helper.make_model(
        helper.make_graph(graph.nodes, "blobs", [entry], results[:outputs], graph.constants),
        opset_imports=[helper.make_opsetid("", 17)], ir_version=8,
    )  # fmt: skip
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return path


def _red(graph: _Graph, picture: str) -> str:
    """[1,1,H,W] in [0,1] of (value - 127.5) / 128, a little steeper than exact: compressed red is not quite red."""
    weights = np.array([[[[0.5]], [[-0.25]], [[-0.25]]]]) * 128 / 127.5
    red = graph.add("Conv", picture, weights.astype(np.float32))
    return graph.add("Clip", graph.add("Sub", graph.add("Mul", red, 1.16), 0.08), 0.0, 1.0)


def _heads(graph: _Graph, mask: str, stride: int, strides: tuple[int, ...], scale: float) -> tuple[str, str, str]:
    """Score [1,h,w,A], distances [1,h,w,4A], offsets [1,h,w,10A] of A anchors a cell. A second one finds nothing."""
    cells = graph.add("AveragePool", mask, kernel_shape=[stride, stride], strides=[stride, stride])
    before, after = np.ones(REACH + 1), np.ones(REACH + 1)
    before[-1] = 0.0
    left = _sums(graph, cells, before[None], [0, REACH, 0, 0])
    top = _sums(graph, cells, before[:, None], [REACH, 0, 0, 0])
    right = _sums(graph, cells, after[None], [0, 0, 0, REACH])
    bottom = _sums(graph, cells, after[:, None], [0, 0, REACH, 0])
    width, height = graph.add("Add", left, right), graph.add("Add", top, bottom)
    sides = _scaled(graph, (left, top, right, bottom), width, height, scale)
    score = _score(graph, cells, (left, right, width), (top, bottom, height), stride, strides)
    offsets = []
    for x, y in POINTS:
        offsets += [graph.add("Sub", graph.add("Mul", width, x), left)]
        offsets += [graph.add("Sub", graph.add("Mul", height, y), top)]
    return (
        _anchors(graph, [score], graph.add("Mul", score, 0.4), strides),
        _anchors(graph, sides, width, strides),
        _anchors(graph, offsets, width, strides),
    )


def _sums(graph: _Graph, cells: str, kernel: np.ndarray, pads: list[int]) -> str:
    return graph.add("Conv", cells, kernel[None, None].astype(np.float32), pads=pads)


def _scaled(graph: _Graph, sides: tuple[str, ...], width: str, height: str, scale: float) -> list[str]:
    """Distances to the edges of a box `scale` times as large about the same middle."""
    more = (scale - 1) / 2
    return [graph.add("Add", d, graph.add("Mul", (width, height)[i % 2], more)) for i, d in enumerate(sides)]


def _score(
    graph: _Graph, cells: str, across: tuple[str, ...], down: tuple[str, ...], stride: int, strides: tuple[int, ...]
) -> str:
    score = _cast(graph, graph.add("Greater", cells, 0.999))
    for low, high, whole in (across, down):
        off = graph.add("Div", graph.add("Abs", graph.add("Sub", low, high)), graph.add("Add", whole, 1.0))
        score = graph.add("Mul", score, graph.add("Sub", 1.0, graph.add("Mul", off, 0.4)))
    # A size for each stride: 8 for boxes less than 96 pixels high, 16 from there to 192, and so on; none takes boxes
    # higher than 16 cells of the largest.
    height = down[2]
    if stride > strides[0]:
        score = graph.add("Mul", score, _cast(graph, graph.add("GreaterOrEqual", height, 6.0)))
    most = 16.0 if stride == strides[-1] else 12.0
    score = graph.add("Mul", score, _cast(graph, graph.add("Less", height, most)))
    shape = _cast(graph, graph.add("Shape", "picture", start=3, end=4))
    share = graph.add("Min", graph.add("Div", shape, 640.0), 1.0)
    return graph.add("Mul", score, graph.add("Add", graph.add("Mul", share, 0.4), 0.59))


def _cast(graph: _Graph, value: str) -> str:
    return graph.add("Cast", value, to=TensorProto.FLOAT)


def _anchors(graph: _Graph, first: list[str], idle: str, strides: tuple[int, ...]) -> str:
    """[1,h,w,AC]: the values of the first anchor, then those of the second if there is one, all `idle`."""
    both = graph.add("Concat", *first, *[idle] * (len(first) if strides == STRIDES[2] else 0), axis=1)
    return graph.add("Transpose", both, perm=[0, 2, 3, 1])
