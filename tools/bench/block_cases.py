"""One block of the video tower of mova-lite, forward and backward: our kernels, and what one would run without them.

Legend: F frames, E text tokens, D width. FLOPs are three forwards of the unmasked model FLOPs (dualforce.model.flops).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from dualforce.config import ModelConfig, TowerConfig
from dualforce.model.block import Block
from dualforce.model.flops import BACKWARD, block_flops
from dualforce.model.path import VIDEO, FullPath, Site
from dualforce.model.rope import video_rotary
from dualforce.presets import build_model_config
from dualforce.types import FrameSpan
from megatron_ext.kernels.kernel_set import KernelSet, select_kernels
from tools.bench.attention_cases import RULE, DenseMask
from tools.bench.gate import ATTENTION_BOUND, Tensors, relative_error, require, results, widened
from tools.bench.measure import Setting, peak_bytes, rates, settled_bytes
from tools.bench.rates import median_ms
from tools.bench.recipes import kernels_of


class Shape(NamedTuple):
    """F frames of side * side tokens, E tokens of text."""

    frames: int
    side: int
    text: int


FULL, SMALL = Shape(21, 32, 512), Shape(3, 16, 64)


def rows(setting: Setting) -> list[dict[str, Any]]:
    """A row a recipe, and how many times as long as ours it takes."""
    model = build_model_config("mova-lite", struct_dim=70, audio_dim=1024)
    found = [_row(name, kernels, model.video, setting) for name, kernels in _recipes(model, setting)]
    for row in found:
        row["x ours"] = row["fwd+bwd ms"] / found[0]["fwd+bwd ms"]
    return found


def _recipes(model: ModelConfig, setting: Setting) -> Iterator[tuple[str, KernelSet]]:
    """One at a time, so that what one keeps is gone before the next is measured."""
    yield "ours", setting.ours
    yield "torch.compile + FlexAttention", kernels_of("usual", setting.device, model)
    plain = select_kernels("reference", setting.device, torch.bfloat16)
    yield "eager + SDPA, dense mask", replace(plain, name="dense", frame_causal=DenseMask().frame_causal)


def _row(name: str, kernels: KernelSet, tower: TowerConfig, setting: Setting) -> dict[str, Any]:
    """Checked, then timed; gradients go to the input and to all parameters."""
    torch.compiler.reset()  # a function is compiled for few shapes, then run eagerly
    check(f"block, {name}", kernels, tower, setting.device)
    torch.compiler.reset()
    before = settled_bytes()
    case = BlockCase(tower, kernels, FULL, setting.device)
    leaves = [case.x.requires_grad_(), *case.block.parameters()]
    above = torch.randn_like(case.x)

    def forward() -> Any:
        return case.block(case.x, case.t_mod, case.text, case.rotary, case.path)

    def both() -> Any:
        return torch.autograd.grad(forward(), leaves, above)

    fwd, total = median_ms([forward]), median_ms([both])
    tokens = FULL.side**2
    pairs = RULE.plan(range(FULL.frames), range(FULL.frames)).pairs(tokens, tokens)
    flops = (1 + BACKWARD) * block_flops(tower, FULL.frames * tokens, pairs, FULL.text).total
    row = {"kernels": name, "fwd ms": fwd, "fwd+bwd ms": total} | rates("TF/s", flops, total, setting)
    return row | {"peak GB": (peak_bytes(both) - before) / 1e9}


class BlockCase:
    """A block in bf16 with the weights and inputs that every recipe gets."""

    def __init__(self, tower: TowerConfig, kernels: KernelSet, shape: Shape, device: torch.device) -> None:
        torch.manual_seed(0)
        span = FrameSpan(0, shape.frames)
        with torch.device(device):
            self.block = Block(tower, kernels, Site(VIDEO, 0)).bfloat16()
            self.x = torch.randn(1, shape.frames, shape.side**2, tower.dim).bfloat16()
            self.t_mod = torch.randn(1, shape.frames, 6, tower.dim)
            self.text = torch.randn(1, shape.text, tower.dim).bfloat16()
        self.rotary = video_rotary(span, shape.side, shape.side, tower.head_dim, device, torch.bfloat16)
        self.path = FullPath(RULE, kernels, span)

    @property
    def leaves(self) -> Tensors:
        """Inputs, and the parameters by name."""
        return {"x": self.x, "t_mod": self.t_mod, "text": self.text} | dict(self.block.named_parameters())

    def call(self, leaves: Tensors) -> Sequence[Tensor]:
        """The block as a function of its leaves, in their dtype."""
        parameters = {name: leaves[name] for name, _ in self.block.named_parameters()}
        inputs = (leaves["x"], leaves["t_mod"], leaves["text"], self.rotary, self.path)
        return (functional_call(self.block, parameters, inputs),)


def check(kernel: str, kernels: KernelSet, tower: TowerConfig, device: torch.device) -> None:
    """Refuse a block whose output or gradients are further from float64 than twice what the reference kernels lose.

    A chain of bf16 operations loses what its roundings lose, more for a gradient that nearly cancels; so the bound is
    taken from the same chain of reference kernels in bf16, and where that loses less than one attention may, from that.
    """
    plain = BlockCase(tower, select_kernels("reference", device, torch.bfloat16), SMALL, device)
    wanted = results(plain.call, widened(plain.leaves), ("out",))
    lost = results(plain.call, plain.leaves, ("out",))
    bounds = {name: max(ATTENTION_BOUND, 2 * relative_error(lost[name], value)) for name, value in wanted.items()}
    case = BlockCase(tower, kernels, SMALL, device)
    require(kernel, results(case.call, case.leaves, ("out",)), wanted, bounds)
