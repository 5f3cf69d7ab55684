"""Products of linear layers against float64, and which of them go to quack; its kernels run in tests/gpu only."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.product_cases import check_results, draw_case, results
from helpers.quack_stand_in import MODULES, hide_quack, install_quack

from megatron_ext.kernels.linear import reference
from megatron_ext.kernels.linear.products import PlainProducts
from megatron_ext.kernels.linear.quack import ROWS, QuackProducts, QuackUnavailable, fuller_waves

PLAIN = PlainProducts(reference.gelu_backward)
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8}


@pytest.mark.parametrize("dtype", UNIT, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "dim", "inner"), [(1, 1, 1), (3, 5, 7), (130, 24, 100)])
def test_plain_products_against_float64(rows: int, dim: int, inner: int, dtype: torch.dtype) -> None:
    case = draw_case(rows, dim, inner, dtype)
    check_results(results(PLAIN, case), case, UNIT[dtype])


def test_what_quack_computes_arrives_where_it_belongs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that computes in fp32: every result, of matrices that are long enough for it."""
    calls = install_quack(monkeypatch)
    monkeypatch.setattr("megatron_ext.kernels.linear.quack.fuller_waves", lambda *_: True)
    case = draw_case(ROWS, 24, 40, torch.bfloat16)
    check_results(results(QuackProducts(PLAIN), case), case, UNIT[torch.bfloat16])
    assert [name for name, _ in calls] == ["act None", "act None", "act gelu_tanh_approx", "dact"]
    found = QuackProducts(PLAIN).gelu_product_backward(case.grad, case.weight_2, case.hidden)
    assert all(one.dtype == torch.bfloat16 for one in found) and found[2].shape == (40,)


def test_the_wide_backward_has_the_larger_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install_quack(monkeypatch)
    for dim in (64, 3072):
        case = draw_case(ROWS, dim, 8, torch.bfloat16)
        QuackProducts(PLAIN).gelu_product_backward(case.grad, case.weight_2, case.hidden)
    assert [(tile.tile_n, tile.cluster_m, tile.cluster_n) for _, tile in calls] == [(160, 2, 1), (192, 1, 2)]


def few_rows(x: torch.Tensor) -> torch.Tensor:
    return x[: ROWS - 1]


def odd_address(x: torch.Tensor) -> torch.Tensor:
    room = x.new_empty(x.numel() + 1)
    return room[1:].view(x.shape).copy_(x)


def odd_rows(x: torch.Tensor) -> torch.Tensor:
    return torch.cat((x, x[:, :1]), dim=1)[:, :-1]


@pytest.mark.parametrize("change", [few_rows, odd_address, odd_rows])
def test_small_and_unaligned_matrices_are_not_quacks(monkeypatch: pytest.MonkeyPatch, change: object) -> None:
    calls = install_quack(monkeypatch)
    monkeypatch.setattr("megatron_ext.kernels.linear.quack.fuller_waves", lambda *_: True)
    case = draw_case(ROWS, 24, 40, torch.bfloat16)
    case = case._replace(**{name: change(getattr(case, name)) for name in ("x", "hidden", "grad")})  # type: ignore[operator]
    check_results(results(QuackProducts(PLAIN), case), case, UNIT[torch.bfloat16])
    assert calls == []


@pytest.mark.parametrize(
    ("dim", "inner", "dtype"), [(20, 40, torch.bfloat16), (24, 36, torch.bfloat16), (24, 40, torch.float32)]
)
def test_odd_widths_and_wide_numbers_are_not_quacks(
    monkeypatch: pytest.MonkeyPatch, dim: int, inner: int, dtype: torch.dtype
) -> None:
    calls = install_quack(monkeypatch)
    monkeypatch.setattr("megatron_ext.kernels.linear.quack.fuller_waves", lambda *_: True)
    case = draw_case(ROWS, dim, inner, dtype)
    check_results(results(QuackProducts(PLAIN), case), case, UNIT[dtype])
    assert calls == []


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        (20480, 1536, True),  # 8 waves of 256 columns, the last 27 % full; 10 of 192, 70 %
        (20480, 4608, False),  # 99 % either way
        (5120, 1536, False),  # 1.8 and 2.4 waves
    ],
)
def test_tiles_of_192_columns_where_they_fill_waves(rows: int, columns: int, expected: bool) -> None:
    assert fuller_waves(rows, columns) == expected


def test_another_quack_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not installed; without the kernels of this version; and one whose import fails otherwise."""
    hide_quack(monkeypatch)
    with pytest.raises(QuackUnavailable, match=r"0\.6\.5 or an equal of it does not import"):
        QuackProducts(PLAIN)
    install_quack(monkeypatch)
    del sys.modules["quack.epilogue.library"].dgelu_dbias_mod  # type: ignore[attr-defined]
    with pytest.raises(QuackUnavailable, match="dgelu_dbias_mod"):
        QuackProducts(PLAIN)
    install_quack(monkeypatch)
    monkeypatch.setitem(sys.modules, MODULES[-1], SimpleNamespace(GemmConfig=lambda tile: None))
    with pytest.raises(QuackUnavailable, match="unexpected keyword") as caught:
        QuackProducts(PLAIN)
    assert "\n" not in str(caught.value)
