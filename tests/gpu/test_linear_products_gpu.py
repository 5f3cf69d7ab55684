"""Products with their epilogues on a GPU: against float64, the same bits every time, recorded by CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.adaln_cases import assert_equal_bits
from helpers.product_cases import check_results, draw_case, results

pytestmark = pytest.mark.gpu

UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
# The video block's MLP and a slice of it, more rows than a tile divides, a width below a tile, and one that quack
# leaves alone.
SIZES = [(20480, 1536, 8960), (4097, 1536, 8960), (2048, 8, 24), (2050, 5120, 200), (80, 512, 2048), (3000, 100, 36)]


@pytest.fixture(scope="module")
def kernels() -> Any:
    """Even where the waves would say otherwise, a product is quack's."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from megatron_ext.kernels.linear import quack, triton
    from megatron_ext.kernels.linear.products import PlainProducts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quack, "fuller_waves", lambda *_: True)
        yield quack.QuackProducts(PlainProducts(triton.gelu_backward))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors hold NaN until they are written, in whatever module."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **named: _spoil(empty(*args, **named)))


def _spoil(x: torch.Tensor) -> torch.Tensor:
    return x.fill_(torch.nan) if x.is_floating_point() else x


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", UNIT, ids=["bf16", "fp16"])
@pytest.mark.parametrize(("rows", "dim", "inner"), SIZES)
def test_against_float64_twice(kernels: Any, rows: int, dim: int, inner: int, dtype: torch.dtype) -> None:
    case = draw_case(rows, dim, inner, dtype, "cuda")
    found = results(kernels, case)
    check_results(found, case, UNIT[dtype])
    assert_equal_bits(found, results(kernels, case))


def test_a_cuda_graph_records_them(kernels: Any) -> None:
    case, other = (draw_case(rows, 1536, 8960, torch.bfloat16, "cuda") for rows in (4096, 4096))
    results(kernels, case)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results(kernels, case)
    for tensor, value in zip(case, other, strict=True):
        tensor.copy_(value.flip(0))
    graph.replay()
    assert_equal_bits(found, results(kernels, case))
