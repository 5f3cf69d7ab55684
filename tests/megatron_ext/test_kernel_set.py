"""The choice of kernels: explicit names never fall back, "auto" says what it chose."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from megatron_ext.kernels.kernel_set import select_kernels

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
