"""Choices between the run file and the engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from helpers.tiny_model import kernels

from dualforce.config import RunConfig, validate
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
def test_graphs_are_on_where_they_have_been_measured(name: str, parallel: dict[str, Any], expected: bool) -> None:
    values = {"preset": "tiny", "deepspeed": "x", "train": {"steps": 1}, "parallel": parallel}
    assert with_graphs(validate(RunConfig, values, "test"), replace(kernels(), name=name)) is expected
