"""Cases of the Triton `split_heads` against its reference in float64, for the interpreter and for a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from megatron_ext.kernels.qk_norm_rope import reference

EPS = 1e-6
# Beside the rounding of results to their dtype, fp32 arithmetic: sums over D or over the rows and a handful of
# products, each within 2^-24 of its value. Their errors are independent; 2^-19 of the largest result is 32 of them.
FP32_NOISE = 2**-19


@dataclass(frozen=True)
class Case:
    """x [B,F,T,parts·N·K]; the first `normed` parts are normed; angle_tokens 0 means no rotation."""

    shape: tuple[int, int, int]
    heads: int
    head: int
    parts: int = 3
    normed: int = 2
    angle_tokens: int | None = None  # T where None
    interleaved: bool = True
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype = torch.float32
    device: str = "cpu"

    @property
    def width(self) -> int:
        return self.heads * self.head


@dataclass(frozen=True)
class Inputs:
    x: Tensor
    weights: tuple[Tensor, ...]
    cos: Tensor | None
    sin: Tensor | None
    gradients: tuple[Tensor | None, ...]


def inputs(case: Case) -> Inputs:
    source = torch.Generator().manual_seed(sum(case.shape) + 7 * case.width + case.parts)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source).to(case.device)

    _, frames, tokens = case.shape
    x = (draw(*case.shape, case.parts * case.width) * 2).to(case.dtype)
    weights = tuple((1 + draw(case.width) / 4).to(case.weight_dtype) for _ in range(case.normed))
    # Every part has its own scale, so that one taken for another shows.
    gradients = tuple(
        (draw(*case.shape, case.heads, case.head) * (1 + part)).to(case.dtype) for part in range(case.parts)
    )
    cos = sin = None
    if case.angle_tokens != 0:
        angle = draw(frames, case.angle_tokens or tokens, case.head // 2).double() * 100
        cos, sin = angle.cos().float(), angle.sin().float()
    return Inputs(x, weights, cos, sin, gradients)


def results(module: ModuleType, case: Case, given: Inputs, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """The outputs, then the gradients of x and of the weights; computed in `dtype` where it is given."""
    x = (given.x if dtype is None else given.x.to(dtype)).detach()
    weights = [(w if dtype is None else w.to(dtype)).detach().requires_grad_() for w in given.weights]
    x.requires_grad_()
    out = module.split_heads(
        x, weights, given.cos, given.sin, parts=case.parts, heads=case.heads, eps=EPS, interleaved=case.interleaved
    )
    used = [i for i, gradient in enumerate(given.gradients) if gradient is not None]
    incoming = [given.gradients[i].to(out[i].dtype) for i in used]  # type: ignore[union-attr]
    gradients = torch.autograd.grad([out[i] for i in used], [x, *weights], incoming, allow_unused=True)
    return [*(one.detach() for one in out), *gradients]


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nothing wrote reads as NaN."""
    empty = torch.empty

    def filled(*size: object, **how: object) -> Tensor:
        out = empty(*size, **how)  # type: ignore[call-overload]
        return out.fill_(float("nan")) if out.is_floating_point() else out

    with mock.patch.object(torch, "empty", filled):
        yield


def half_step(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours of `dtype` at the values: the error of one rounding to nearest."""
    info = torch.finfo(dtype)
    return torch.exp2(torch.floor(torch.log2(value.abs().clamp_min(info.tiny)))) * info.eps / 2


def assert_close(name: str, got: Tensor | None, truth: Tensor | None, slack: float = 1.0) -> None:
    """Each element within `slack` roundings of the float64 truth, plus fp32 noise at the scale of the whole tensor."""
    if truth is None or got is None:
        # A weight whose part nothing used: autograd leaves None, a kernel may give zeros.
        assert truth is None and (got is None or not got.any()), name
        return
    assert got.shape == truth.shape, f"{name}: {got.shape} {truth.shape}"
    noise = FP32_NOISE * truth.abs().max().clamp_min(1e-30)
    # The half step above the truth: noise may lift a value to where neighbours are twice as far apart.
    bound = slack * half_step(truth.abs() + noise, got.dtype) + noise
    error = (got.double() - truth).abs()
    worst = (error / bound).max()
    assert worst <= 1, f"{name}: {worst:.3g} times the bound, largest error {error.max():.3g}"  # NaN fails too


def check(module: ModuleType, case: Case, given: Inputs | None = None, slack: float = 1.0) -> None:
    """Outputs and every gradient against float64; outputs poisoned; a second run gives equal bits."""
    given = inputs(case) if given is None else given
    truth = results(reference, case, given, torch.float64)
    with poisoned():
        got = results(module, case, given)
    names = [f"part {i}" for i in range(case.parts)] + ["dx"] + [f"dw {i}" for i in range(case.normed)]
    for i, (name, one, wanted) in enumerate(zip(names, got, truth, strict=True)):
        label = f"{case} {name}"
        assert_close(label, one, wanted, slack)
        assert one is None or one.dtype == (case.weight_dtype if name.startswith("dw") else case.dtype), label
        if i < case.normed:
            assert one is not None and one.is_contiguous(), label
    for i in range(case.normed, case.parts):
        part = given.x[..., i * case.width : (i + 1) * case.width]
        assert got[i].data_ptr() == part.data_ptr(), f"{case}: part {i} was copied"  # type: ignore[union-attr]
    for name, one, other in zip(names, got, results(module, case, given), strict=True):
        assert (one is None and other is None) or torch.equal(one, other), f"{case} {name}: bits differ"


def assert_no_worse(module: ModuleType, case: Case, given: Inputs, ratio: float = 1.5) -> None:
    """Root mean square errors against float64 at most `ratio` times those of the reference in the case's dtype."""
    truth = results(reference, case, given, torch.float64)
    for i, (one, plain, wanted) in enumerate(
        zip(results(module, case, given), results(reference, case, given), truth, strict=True)
    ):
        if one is None or plain is None or wanted is None:
            continue
        ours, theirs = ((t.double() - wanted).pow(2).mean().sqrt() for t in (one, plain))
        # Both may be exact, or nearly: 2^-26 of the scale is a quarter of what fp32 distinguishes.
        floor = 2**-26 * wanted.pow(2).mean().sqrt()
        assert ours <= ratio * theirs + floor, f"{case} result {i}: {ours:.3g} against {theirs:.3g}"


def strided(case: Case) -> list[Inputs]:
    """The case's inputs under other strides: x inside wider rows; x and the gradients without uniform rows; gradients
    that are views of one packed tensor."""
    plain = inputs(case)
    wider = torch.nn.functional.pad(plain.x, (16, 32), value=float("nan"))[..., 16:-32]
    turned = plain.x.transpose(0, 2).contiguous().transpose(0, 2)
    gradients = [g for g in plain.gradients if g is not None]
    packed = torch.stack(gradients, 3).unbind(3)
    crossed = tuple(g.transpose(2, 3).contiguous().transpose(2, 3) for g in gradients)
    spread = tuple(torch.stack((g, g), -1)[..., 0] for g in gradients)
    return [
        Inputs(wider, plain.weights, plain.cos, plain.sin, packed),
        Inputs(turned, plain.weights, plain.cos, plain.sin, crossed),
        Inputs(plain.x, plain.weights, plain.cos, plain.sin, spread),
    ]


def unused(case: Case) -> Iterator[Inputs]:
    """The case's inputs with only some of the parts used."""
    plain = inputs(case)
    for used in range(1, 2**case.parts - 1):
        gradients: Sequence[Tensor | None] = [g if used >> i & 1 else None for i, g in enumerate(plain.gradients)]
        yield Inputs(plain.x, plain.weights, plain.cos, plain.sin, tuple(gradients))


def without_gradients(module: ModuleType, case: Case) -> None:
    """Frozen weights and a frozen x get None and change nothing else; no graph in no_grad."""
    given = inputs(case)
    how = {"parts": case.parts, "heads": case.heads, "eps": EPS, "interleaved": case.interleaved}
    full = results(module, case, given)
    x = given.x.detach().requires_grad_()
    out = module.split_heads(x, given.weights, given.cos, given.sin, **how)
    torch.autograd.backward(out, given.gradients)
    assert x.grad is not None and torch.equal(x.grad, full[case.parts])
    weights = [w.detach().requires_grad_(i == 0) for i, w in enumerate(given.weights)]
    out = module.split_heads(given.x, weights, given.cos, given.sin, **how)
    torch.autograd.backward(out[: case.normed], given.gradients[: case.normed])
    assert torch.equal(weights[0].grad, full[case.parts + 1]) and weights[1].grad is None
    with torch.no_grad():
        out = module.split_heads(x, weights, given.cos, given.sin, **how)
    assert not any(one.requires_grad for one in out[: case.normed])


def wrong_arguments(module: ModuleType) -> None:
    """Shapes that a kernel would misread are refused."""
    given = inputs(Case((1, 2, 3), 2, 4))
    right = {"parts": 3, "heads": 2, "eps": EPS, "interleaved": True}
    wrong = [
        (given.x, given.weights, given.cos, {**right, "parts": 1}),
        (given.x, (), given.cos, right),
        (given.x, given.weights, given.cos, {**right, "heads": 3}),
        (given.x, (given.weights[0], given.weights[1].double()), given.cos, right),
        (given.x, (given.weights[0][:4],) * 2, given.cos, right),
        (given.x, given.weights, given.cos[:, :2], right),
        (given.x, given.weights, given.cos.double(), right),
        (given.x, given.weights, given.cos[..., :1], right),
        (given.x[0], given.weights, given.cos, right),
    ]
    for x, weights, angle, how in wrong:
        try:
            module.split_heads(x, weights, angle, angle, **how)
        except ValueError:
            continue
        raise AssertionError(f"no ValueError for {tuple(x.shape)} {[tuple(w.shape) for w in weights]} {how}")
