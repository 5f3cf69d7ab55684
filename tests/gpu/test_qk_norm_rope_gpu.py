"""The Triton `split_heads` on a GPU: against float64, and no worse than the eager reference in the same dtype."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

# The cases lie beside the interpreter's test, in a folder that cannot be a package: it would hide megatron_ext.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "megatron_ext"))

from qk_cases import Case, assert_no_worse, check, inputs, strided, unused, without_gradients, wrong_arguments

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("triton")
    from megatron_ext.kernels.qk_norm_rope import triton as module

    return module


def outer(tokens: int) -> tuple[int, int, int]:
    """[B,F,T] with several frames and clips where that stays small."""
    return (2, 3, tokens) if tokens < 1000 else (1, 2, tokens)


@pytest.mark.parametrize("interleaved", [True, False], ids=["pairs", "halves"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "head"), [(12, 128), (12, 64), (40, 128), (3, 128), (4, 16)])
@pytest.mark.parametrize("tokens", [1, 4, 255, 880, 1024, 4096])
def test_packed_q_k_v(
    kernels: ModuleType, tokens: int, heads: int, head: int, dtype: torch.dtype, interleaved: bool
) -> None:
    case = Case(outer(tokens), heads, head, interleaved=interleaved, dtype=dtype, device="cuda")
    given = inputs(case)
    check(kernels, case, given)
    assert_no_worse(kernels, case, given)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float16), ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case((2, 3, 65), 12, 128, parts=2, normed=1, angle_tokens=1, interleaved=False),
        Case((2, 3, 65), 12, 128, parts=1, normed=1, interleaved=False),
        Case((2, 1, 512), 12, 128, parts=2, normed=1, angle_tokens=0),
        Case((1, 3, 5), 64, 128, parts=3, normed=3),
        Case((1, 3, 7), 3, 48, parts=3, normed=1),
        Case((2, 2, 9), 8, 48, interleaved=False),
        Case((2, 2, 9), 5, 2),
        Case((2, 2, 9), 5, 6, interleaved=False),
        Case((2, 2, 9), 2, 256),
        Case((1, 2, 33), 12, 128, weight_dtype=torch.bfloat16),
    ],
    ids=lambda case: f"{'x'.join(map(str, case.shape))}-{case.heads}x{case.head}-{case.parts}",
)
def test_other_packings_and_sizes(kernels: ModuleType, case: Case, dtype: torch.dtype) -> None:
    case = Case(**{**case.__dict__, "dtype": dtype, "device": "cuda"})
    check(kernels, case)
    assert_no_worse(kernels, case, inputs(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_unused_parts(kernels: ModuleType, dtype: torch.dtype) -> None:
    case = Case((2, 3, 37), 12, 64, dtype=dtype, device="cuda")
    for given in (*strided(case), *unused(case)):
        check(kernels, case, given)
    without_gradients(kernels, case)


def test_offsets_beyond_31_bits(kernels: ModuleType) -> None:
    """The last rows of 2^31 + elements are those of a small input."""
    rows = 2**31 // (3 * 1536) + 4
    x = torch.zeros(1, 1, rows, 3 * 1536, dtype=torch.bfloat16, device="cuda")
    x[:, :, -2:] = torch.randn(2, 3 * 1536, device="cuda")
    weights = [torch.rand(1536, device="cuda").requires_grad_() for _ in range(2)]
    how = {"parts": 3, "heads": 12, "eps": 1e-6, "interleaved": True}
    ends, gradients = [], []
    for part in (x.requires_grad_(), x[:, :, -2:].detach().clone().requires_grad_()):
        out = kernels.split_heads(part, weights, None, None, **how)
        ends.append([one[:, :, -2:].detach().clone() for one in out])
        gradients.append(torch.autograd.grad([one[:, :, -2:] for one in out], part, ends[0])[0][:, :, -2:].clone())
        del out
    for long, short in zip((*ends[0], gradients[0]), (*ends[1], gradients[1]), strict=True):
        assert torch.equal(long, short)


def test_refusals(kernels: ModuleType) -> None:
    wrong_arguments(kernels)
