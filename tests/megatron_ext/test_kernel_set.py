"""The choice of kernels: explicit names never fall back, "auto" says what it chose."""

from __future__ import annotations

import dataclasses
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.quack_stand_in import hide_quack, install_quack

from megatron_ext.kernels import kernel_set
from megatron_ext.kernels.kernel_set import KernelsUnavailable, select_kernels
from megatron_ext.kernels.linear.products import PlainProducts
from megatron_ext.kernels.linear.quack import QuackProducts

CPU = torch.device("cpu")


def test_reference_runs_everywhere() -> None:
    kernels = select_kernels("reference", CPU, torch.bfloat16)
    assert (kernels.name, kernels.dtype) == ("reference", torch.bfloat16)
    with pytest.raises(dataclasses.FrozenInstanceError):
        kernels.name = "other"  # type: ignore[misc]


def test_auto_logs_its_choice(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        chosen = select_kernels("auto", CPU, torch.float32)
    assert chosen.name in caplog.text and "cpu" in caplog.text


def test_fused_without_a_gpu_is_an_error_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"kernels = fused.*cpu"):
        select_kernels("fused", CPU, torch.float32)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="kernels = quick: expected auto, reference, fused or flex"):
        select_kernels("quick", CPU, torch.float32)


CUDA = torch.device("cuda")
LITE = {"video": 128, "struct": 64}


def on_gpu(monkeypatch: pytest.MonkeyPatch, major: int, flash: bool = False) -> None:
    """As if there were a GPU of this compute capability, and flash-attn-4 or not."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.block_sparsity"):
        monkeypatch.setitem(sys.modules, name, None)  # import raises ImportError
    if flash:
        monkeypatch.setattr(kernel_set, "FlashAttention", lambda device: SimpleNamespace(frame_causal="f", attend="a"))


@pytest.mark.parametrize(
    ("name", "major", "dtype", "sizes", "message"),
    [
        ("fused", 9, torch.float32, LITE, r"kernels = fused on cuda torch.float32: expected torch.bfloat16 or"),
        ("flex", 7, torch.bfloat16, LITE, r"compute capability 7.0, expected 8.0 or more; use reference"),
        ("fused", 9, torch.bfloat16, {"video": 96, "struct": 64}, r"head size video = 96; expected one of \(64, 128\)"),
        ("fused", 9, torch.bfloat16, LITE, r"flash-attn-4 does not import .*install the extra `fused`; or use flex"),
        ("fused", 8, torch.bfloat16, LITE, r"compute capability 9.x, this device has 8.0; or use flex"),
    ],
)
def test_what_a_gpu_cannot_run_is_one_line_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, name: str, major: int, dtype: torch.dtype, sizes: dict[str, int], message: str
) -> None:
    on_gpu(monkeypatch, major)
    with pytest.raises(KernelsUnavailable, match=message) as caught:
        select_kernels(name, CUDA, dtype, sizes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("major", "flash", "sizes", "expected"),
    [(9, True, LITE, "fused"), (9, False, LITE, "flex"), (8, False, LITE, "flex"), (7, False, LITE, "reference"),
     (9, True, {"video": 32}, "reference")],
)  # fmt: skip
def test_auto_takes_the_fastest_that_can(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, major: int, flash: bool, sizes: dict[str, int],
    expected: str,
) -> None:  # fmt: skip
    on_gpu(monkeypatch, major, flash)
    with caplog.at_level(logging.INFO):
        chosen = select_kernels("auto", CUDA, torch.bfloat16, sizes)
    assert chosen.name == expected and f"kernels: {expected}, chosen" in caplog.text
    backend = "reference" if expected == "reference" else "triton"
    for kernel in (chosen.adaln, chosen.split_heads, chosen.column_sum):
        assert kernel.__module__.endswith(f".{backend}")


@pytest.mark.parametrize("there", [True, False])
def test_fused_without_quack_says_so_and_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, there: bool
) -> None:
    on_gpu(monkeypatch, 9, flash=True)
    install_quack(monkeypatch) if there else hide_quack(monkeypatch)
    chosen = select_kernels("fused", CUDA, torch.bfloat16, LITE)
    assert isinstance(chosen.product.__self__, QuackProducts if there else PlainProducts)  # type: ignore[attr-defined]
    assert ("quack-kernels 0.6.5 or an equal of it does not import" in caplog.text) != there
    assert len(caplog.records) == (0 if there else 1)


def test_flex_runs_without_quack(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu(monkeypatch, 8)
    install_quack(monkeypatch)
    chosen = select_kernels("flex", CUDA, torch.bfloat16, LITE)
    assert isinstance(chosen.gelu_product.__self__, PlainProducts)  # type: ignore[attr-defined]
