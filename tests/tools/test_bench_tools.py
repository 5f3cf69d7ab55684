"""The parts of the kernel benchmark that need no GPU: the gate, the tables, the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dualforce.model.path import ChunkRule
from dualforce.presets import build_model_config
from megatron_ext.kernels.attention import reference
from megatron_ext.kernels.attention.plan import FramePlan
from megatron_ext.kernels.kernel_set import KernelSet, select_kernels
from tools import bench_kernels
from tools.bench import attention_cases, block_cases, elementwise_cases
from tools.bench.attention_cases import Case, DenseMask, dense_mask
from tools.bench.gate import Tensors, agree, relative_error, require, results
from tools.bench.measure import Setting, rates
from tools.bench.table import show, write_json

CPU = torch.device("cpu")


@pytest.fixture
def plain() -> KernelSet:
    return select_kernels("reference", CPU, torch.bfloat16)


def changed(kernels: KernelSet, **other: Any) -> KernelSet:
    return KernelSet(**{**vars(kernels), "name": "changed", **other})


class WrongGradient(torch.autograd.Function):
    """The identity, whose gradient is 2 % too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 1.02 * grad


def leaves() -> Tensors:
    source = torch.Generator().manual_seed(3)
    return {name: torch.randn(8, 8, generator=source).bfloat16() for name in ("a", "b")}


def product(values: Tensors) -> tuple[Tensor]:
    return (values["a"] @ values["b"],)


def test_gate_lets_rounding_pass() -> None:
    agree("product", product, product, leaves(), ("out",), 4e-3)


def test_gate_refuses_a_wrong_output_in_one_line() -> None:
    with pytest.raises(SystemExit) as refused:
        agree("product", lambda v: (1.01 * product(v)[0],), product, leaves(), ("out",), 4e-3)
    line = str(refused.value.code)
    assert line.startswith("product: out: relative error ") and line.endswith("expected at most 4.00e-03")
    assert "\n" not in line


def test_gate_refuses_a_wrong_gradient() -> None:
    def wrong(values: Tensors) -> tuple[Tensor]:
        return product({"a": values["a"], "b": WrongGradient.apply(values["b"])})

    with pytest.raises(SystemExit, match=r"product: db: relative error .*e-02"):
        agree("product", wrong, product, leaves(), ("out",), 6e-3)


@pytest.mark.parametrize(
    "found",
    [torch.full((3,), torch.nan), torch.ones(4), torch.tensor([1.0, 1.0, torch.inf]), None],
    ids=["nan", "shape", "inf", "missing"],
)
def test_gate_refuses_what_is_no_number(found: Tensor | None) -> None:
    with pytest.raises(SystemExit, match="k: out: relative error"):
        require("k", {} if found is None else {"out": found}, {"out": torch.ones(3)}, {"out": 1.0})


def test_zero_must_be_met_exactly() -> None:
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.full((2,), 1e-30), torch.zeros(2)) == float("inf")


def test_gradients_of_outputs_are_the_same_in_every_dtype() -> None:
    narrow = results(lambda v: (v["x"] * 1,), {"x": torch.ones(50).bfloat16()}, ("out",))
    wide = results(lambda v: (v["x"] * 1,), {"x": torch.ones(50).double()}, ("out",))
    assert torch.equal(narrow["dx"].double(), wide["dx"])


@pytest.mark.parametrize("case", [Case("", 3, 5, 5, 2, 64), Case("", 3, 5, 2, 1, 64), Case("", 3, 2, 5, 1, 64)])
def test_dense_mask_is_the_plan(case: Case) -> None:
    plan = case.plan()
    mask = dense_mask(plan, case.query_tokens, case.frames, case.key_tokens, CPU)
    assert mask.sum() == plan.pairs(case.query_tokens, case.key_tokens)
    attention_cases.check("dense", DenseMask().frame_causal, case, CPU)


def test_dense_mask_follows_another_plan() -> None:
    attend = DenseMask().frame_causal
    q, k, v = (x.double() for x in Case("", 4, 3, 3, 1, 64).tensors(CPU).values())
    for rule in (ChunkRule(1, None, 0), ChunkRule(2, 1, 1)):
        plan = rule.plan(range(4), range(4))
        assert torch.allclose(attend(q, k, v, plan), reference.frame_causal(q, k, v, plan))


def test_attention_that_sees_the_future_is_refused() -> None:
    def everything(q: Tensor, k: Tensor, v: Tensor, plan: FramePlan) -> Tensor:
        return reference.attend(*(x.flatten(1, 2) for x in (q, k, v))).unflatten(1, q.shape[1:3])

    with pytest.raises(SystemExit, match="leak: out"):
        attention_cases.check("leak", everything, Case("", 3, 4, 4, 1, 64), CPU)


def operations() -> list[elementwise_cases.Op]:
    shape = elementwise_cases.Shape(2, 2, 3)
    return elementwise_cases.adaln_ops(shape, 96) + elementwise_cases.qk_ops(shape, CPU)


@pytest.mark.parametrize("index", range(5))
def test_elementwise_gate(plain: KernelSet, index: int) -> None:
    op = operations()[index]
    elementwise_cases.check(op, plain, CPU)
    kernel = op.name.split(",")[0]

    def wrong(*values: Any, **options: Any) -> Any:
        made = getattr(plain, kernel)(*values, **options)
        return made * 1.01 if isinstance(made, Tensor) else (made[0], made[1] * 1.01, *made[2:])

    with pytest.raises(SystemExit, match=f"{op.name}, width {op.dim}: {op.outputs[min(1, len(op.outputs) - 1)]}: "):
        elementwise_cases.check(op, changed(plain, **{kernel: wrong}), CPU)


def test_modulations_are_strided_views() -> None:
    drawn = operations()[2].draw(torch.Generator().manual_seed(0))
    assert drawn["gate"].dtype == torch.float32 and drawn["gate"].stride() == (2 * 6 * 96, 6 * 96, 1)


def test_block_gate(plain: KernelSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_cases, "SMALL", block_cases.Shape(2, 2, 3))
    tower = build_model_config("tiny", struct_dim=70, audio_dim=1024).video
    block_cases.check("block", changed(plain, frame_causal=DenseMask().frame_causal), tower, CPU)

    def no_gate(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return x + y + 0 * gate[:, :, None].to(x.dtype)

    with pytest.raises(SystemExit, match="block: out: "):
        block_cases.check("block", changed(plain, gated_residual=no_gate), tower, CPU)


def test_rates(plain: KernelSet) -> None:
    found = rates("TF/s", 989e9, 2.0, Setting(CPU, plain, 800.0, True))
    assert found == {"TF/s": 494.5, "of matmul": 494.5 / 800, "of 989": 0.5}


def test_table_aligns() -> None:
    lines = show("title", [{"name": "a", "ms": 1.23456, "n": 7}, {"name": "long", "ms": 12345.6}]).split("\n")
    assert lines == ["title", "name     ms  n", "a     1.235  7", "long  12346  -"]


def test_table_has_columns_of_later_rows() -> None:
    assert show("t", [{"a": 1}, {"a": 2, "b": 123.45}]).split("\n")[1:] == ["a      b", "1      -", "2  123.5"]


def test_json_round_trip(tmp_path: Path) -> None:
    content = {"groups": {"qk": [{"ms": 0.1, "of copy": None}]}, "quick": True}
    write_json(tmp_path / "new" / "rows.json", content)
    assert json.loads((tmp_path / "new" / "rows.json").read_text()) == content


def test_command_prints_and_writes_the_groups(
    plain: KernelSet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bench_kernels, "prepare", lambda quick: Setting(CPU, plain, 776.54, quick))
    monkeypatch.setattr(bench_kernels, "GROUPS", {"qk": ("Title", lambda s: [{"kernel": "k", "quick": s.quick}])})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert bench_kernels.main(["--quick", "--only", "qk", "--json", str(tmp_path / "x.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("device Some GPU, torch ") and "Title\nkernel  quick\nk        True\n" in printed
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["groups"] == {"qk": [{"kernel": "k", "quick": True}]}
    assert written["machine"]["matmul TFLOP/s"] == 776.5 and written["machine"]["torch"] == torch.__version__


def test_unknown_group_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_kernels.main(["--only", "qk,bad"]) == 2
    expected = "error: --only qk,bad: 'bad': expected some of attention, adaln, qk, block\n"
    assert capsys.readouterr() == ("", expected)


def test_without_a_gpu_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_kernels.main([]) == 2
    assert capsys.readouterr() == ("", "error: tools.bench_kernels: no CUDA device: expected an NVIDIA GPU\n")
