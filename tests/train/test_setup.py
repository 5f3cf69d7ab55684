"""Choices between the run file and the engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from helpers.tiny_model import kernels

from dualforce.config import ConfigError, RunConfig, validate
from dualforce.train.setup import with_graphs


@pytest.mark.parametrize(
    ("name", "parallel", "expected"),
    [
        ("fused", {}, True),
        ("flex", {}, False),
        ("reference", {}, False),
        ("fused", {"recompute": "full"}, True),
        ("fused", {"recompute": "selective"}, True),
        ("fused", {"recompute": "offload"}, False),
        ("fused", {"graphs": False}, False),
        ("flex", {"graphs": True}, True),
    ],
)
def test_graphs_are_on_where_they_run(name: str, parallel: dict[str, Any], expected: bool) -> None:
    values = {"preset": "tiny", "deepspeed": "x", "train": {"steps": 1}, "parallel": parallel}
    assert with_graphs(validate(RunConfig, values, "test"), replace(kernels(), name=name)) is expected


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_captured_exchanges_in_expandable_memory_are_refused(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """Before the ranks wait for each other, for ever."""
    monkeypatch.setenv(variable, "max_split_size_mb:512, expandable_segments:True")
    values: dict[str, Any] = {"preset": "tiny", "deepspeed": "x", "train": {"steps": 1}}
    fused = replace(kernels(), name="fused")
    assert with_graphs(validate(RunConfig, values, "test"), fused)
    assert not with_graphs(validate(RunConfig, values | {"parallel": {"sequence": 2, "graphs": False}}, "test"), fused)
    with pytest.raises(ConfigError, match=r"parallel.sequence = 2 .*expandable_segments:True .*expected") as error:
        with_graphs(validate(RunConfig, values | {"parallel": {"sequence": 2}}, "test"), fused)
    assert "\n" not in str(error.value)
