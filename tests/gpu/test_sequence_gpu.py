"""Two GPUs that share their clips: CUDA graphs with exchanges in them change nothing, and the run comes to its end."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.gpu_ranks import run_ranks

pytestmark = pytest.mark.gpu

SECONDS = 400  # flash-attn-4 compiles for up to two minutes; NCCL that waits for a graph would wait for ever


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} CUDA devices: two are needed")
    pytest.importorskip("flash_attn")
    out = tmp_path_factory.mktemp("sequence") / "losses.json"
    assert run_ranks("gpu.sequence_cases", [str(out)], 2, SECONDS) == [0, 0]
    return json.loads(out.read_text())


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_graphs_with_exchanges_change_nothing(losses: dict[str, list[float]], recompute: str) -> None:
    """Only flash-attn-4's dq, added up by atomics, differs in its last bits."""
    plain, graphed = (losses[f"{recompute} {graphs}"] for graphs in (False, True))
    assert plain[-1] < 0.97 * plain[0]
    assert max(abs(a - b) / abs(b) for a, b in zip(graphed, plain, strict=True)) < 1e-2
    assert max(abs(a - b) / abs(b) for a, b in zip(plain, losses["none False"], strict=True)) < 1e-2
