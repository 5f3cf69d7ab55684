"""ZeRO-3 on GPUs: its stream of reductions, and the project's step beside DeepSpeed's own."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from helpers.gpu_ranks import run_ranks
from invariants.zero3_cases import LAYERS, SPOILT, STEPS

from dualforce.train.zero3 import WaitedStream

pytestmark = pytest.mark.gpu

CYCLES = 400_000_000  # about 0.2 s on an H100


def test_later_work_waits_and_the_host_does_not() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    stream, written = WaitedStream(), torch.zeros(1000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        written.fill_(3.0)
    stream.synchronize()
    assert not stream.query()  # it is still at work
    assert written.sum().item() == 3000.0


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """With as many GPUs as there are, up to two."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    out, world = tmp_path_factory.mktemp("zero3") / "measured.json", min(2, torch.cuda.device_count())
    assert run_ranks("invariants.zero3_cases", [str(out)], world, 240) == [0] * world
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", ["fp32 x1", "bf16 x1", "bf16 x2"])
def test_step_is_that_of_deepspeed(measured: dict[str, Any], case: str) -> None:
    """AdamW in one Triton pass, NCCL's mean straight into the gradients' place; bounds as on the CPU."""
    ours, theirs = measured[f"ours {case}"], measured[f"deepspeed {case}"]
    assert ours["one pass"] and not theirs["one pass"]
    assert math.isclose(ours["norms"][0], theirs["norms"][0], rel_tol=3e-7 if case == "fp32 x1" else 1e-3)
    for a, b in zip(ours["first"], theirs["first"], strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-6, atol=1e-7)
    pairs = zip(ours["norms"], theirs["norms"], strict=True)
    assert all(a == b or math.isclose(a, b, rel_tol=1e-2) for a, b in pairs)
    assert ours["moved"] == [step != SPOILT for step in range(STEPS)] and ours["copied"]
    assert ours["straight"] == (0 if case == "bf16 x2" else 2 * LAYERS * STEPS)
