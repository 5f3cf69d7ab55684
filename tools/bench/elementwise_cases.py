"""The memory-bound kernels, AdaLN family and q/k norm with RoPE, against a copy that moves as many bytes.

Legend: B batch, F frames, T tokens a frame, L = F * T, D width, N heads, K head size. NB = L * D * 2 bytes is one bf16
activation; modulations, weights, angles and statistics are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualforce.model.rope import video_rotary
from dualforce.types import FrameSpan
from megatron_ext.kernels.kernel_set import KernelSet, select_kernels
from tools.bench.gate import ELEMENTWISE_BOUND, Tensors, agree
from tools.bench.measure import Prepare, Setting, floor_ms, kernel_ms

EPS = 1e-6
WIDTHS = (1536, 5120)
HEADS, HEAD_SIZE = 12, 128


class Shape(NamedTuple):
    """F frames of height * width tokens."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        return self.height * self.width


FULL, SMALL = Shape(21, 32, 32), Shape(3, 5, 20)


class Op(NamedTuple):
    """One operation at one shape."""

    name: str
    dim: int
    outputs: tuple[str, ...]
    draw: Callable[[torch.Generator], Tensors]  # leaves, bf16 but for modulations
    call: Callable[[KernelSet, Tensors], Sequence[Tensor]]
    traffic: tuple[int, int]  # NB that the forward and the backward move


def adaln_rows(setting: Setting) -> list[dict[str, Any]]:
    """At both widths; the narrow one only when the setting is quick."""
    widths = WIDTHS[:1] if setting.quick else WIDTHS
    return [_row(index, partial(adaln_ops, dim=dim), setting) for dim in widths for index in range(3)]


def qk_rows(setting: Setting) -> list[dict[str, Any]]:
    """Packed q, k and v, and q and k alone, heads of `HEAD_SIZE`."""
    return [_row(index, partial(qk_ops, device=setting.device), setting) for index in range(2)]


def adaln_ops(shape: Shape, dim: int) -> list[Op]:
    """x, y [1,F,T,D]; shift, scale and gate as a block takes them, strided fp32 views of [1,F,6,D]."""

    def drawing(*wide: str, rows: Sequence[str]) -> Callable[[torch.Generator], Tensors]:
        def draw(source: torch.Generator) -> Tensors:
            size = (1, shape.frames, shape.tokens, dim)
            leaves = {name: _normal(source, *size).bfloat16() for name in wide}
            table = _normal(source, 1, shape.frames, 6, dim)
            return leaves | dict(zip(rows, table.unbind(2), strict=False))

        return draw

    three = ("shift", "scale", "gate")
    return [
        Op("adaln", dim, ("out",), drawing("x", rows=three[:2]), _adaln, (2, 3)),
        Op("gated_residual", dim, ("out",), drawing("x", "y", rows=three[2:]), _gated_residual, (3, 3)),
        Op("adaln_residual", dim, ("total", "out"), drawing("x", "y", rows=three), _adaln_residual, (4, 6)),
    ]


def qk_ops(shape: Shape, device: torch.device) -> list[Op]:
    """x [1,F,T,parts*D]. What passes unchanged costs nothing forward; backward its gradient is read and written."""
    angles = video_rotary(FrameSpan(0, shape.frames), shape.height, shape.width, HEAD_SIZE, device, torch.float32)
    dim = HEADS * HEAD_SIZE

    def operation(parts: int, traffic: tuple[int, int]) -> Op:
        def draw(source: torch.Generator) -> Tensors:
            x = _normal(source, 1, shape.frames, shape.tokens, parts * dim)
            weights = {name: (1 + 0.2 * _normal(source, dim)).bfloat16() for name in ("wq", "wk")}
            return {"x": x.bfloat16()} | weights

        def call(kernels: KernelSet, leaves: Tensors) -> Sequence[Tensor]:
            return kernels.split_heads(
                leaves["x"], (leaves["wq"], leaves["wk"]), *angles,
                parts=parts, heads=HEADS, eps=EPS, interleaved=True,
            )  # fmt: skip

        return Op(f"split_heads, {parts} parts", dim, ("q", "k", "v")[:parts], draw, call, traffic)

    return [operation(3, (4, 8)), operation(2, (4, 6))]


def check(op: Op, kernels: KernelSet, device: torch.device) -> None:
    """Refuse the kernel of an operation that disagrees with its reference."""
    plain = select_kernels("reference", device, torch.bfloat16)
    leaves = op.draw(torch.Generator(device).manual_seed(0))
    agree(
        f"{op.name}, width {op.dim}", lambda found: op.call(kernels, found), lambda wanted: op.call(plain, wanted),
        leaves, op.outputs, ELEMENTWISE_BOUND,
    )  # fmt: skip


def _row(index: int, ops: Callable[[Shape], list[Op]], setting: Setting) -> dict[str, Any]:
    """Operation number `index`: checked on the small shape, timed on the full one."""
    check(ops(SMALL)[index], setting.ours, setting.device)
    op = ops(FULL)[index]
    sets = 3 if op.dim <= 2048 else 2  # several: none of it is in the cache when it is read again
    source = torch.Generator(setting.device).manual_seed(0)
    inputs = [op.draw(source) for _ in range(sets)]
    activation = FULL.frames * FULL.tokens * op.dim * 2
    row: dict[str, Any] = {"kernel": op.name, "width": op.dim, "NB moved": "{} + {}".format(*op.traffic)}
    for way, times, prepare in zip(("fwd", "bwd"), op.traffic, (_forward, _backward), strict=True):
        ms = kernel_ms([prepare(op, setting.ours, leaves) for leaves in inputs])
        floor = floor_ms(times * activation, sets)
        row |= {f"{way} ms": ms, f"{way} copy ms": floor, f"{way} of copy": floor / ms}
    return row


def _forward(op: Op, kernels: KernelSet, leaves: Tensors) -> Prepare:
    def call() -> object:
        with torch.no_grad():
            return op.call(kernels, leaves)

    return lambda: call


def _backward(op: Op, kernels: KernelSet, leaves: Tensors) -> Prepare:
    def prepare() -> Callable[[], object]:
        fresh = [value.detach().requires_grad_() for value in leaves.values()]
        made = op.call(kernels, dict(zip(leaves, fresh, strict=True)))
        above = [torch.randn(value.shape, dtype=value.dtype, device=value.device) for value in made]
        return lambda: torch.autograd.grad(made, fresh, above, retain_graph=True)

    return prepare


def _adaln(kernels: KernelSet, leaves: Tensors) -> tuple[Tensor]:
    return (kernels.adaln(leaves["x"], leaves["shift"], leaves["scale"], EPS),)


def _gated_residual(kernels: KernelSet, leaves: Tensors) -> tuple[Tensor]:
    return (kernels.gated_residual(leaves["x"], leaves["y"], leaves["gate"]),)


def _adaln_residual(kernels: KernelSet, leaves: Tensors) -> tuple[Tensor, Tensor]:
    return kernels.adaln_residual(leaves["x"], leaves["y"], leaves["gate"], leaves["shift"], leaves["scale"], EPS)


def _normal(source: torch.Generator, *size: int) -> Tensor:
    return torch.randn(size, generator=source, device=source.device)
