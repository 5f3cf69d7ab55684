"""The FLOP count against what torch counts while the reference model runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.tiny_model import TEXT_TOKENS, kernels, random_inputs, tiny_config, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dualforce.model.flops import forward_flops
from dualforce.model.path import FullPath
from dualforce.presets import build_model_config
from dualforce.types import FrameSpan


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bridge": {"layers": "full", "directions": "s2v"}},
        {"bridge": {"layers": [1], "directions": "v2s"}},
        {"bridge": {"directions": "none"}},
        {"frames_per_chunk": 1},
        {"window": 2, "sink": 1},
        {"video": {"text": False}, "struct": {"text": False}},
        {"audio": {"inner": None, "layers": 3, "context": 0}},
    ],
    ids=str,
)
def test_equals_torch_s_count(changes: dict[str, Any]) -> None:
    config = tiny_config(**changes)
    frames = 7
    noised, cond = random_inputs(config, frames=frames)
    model, span = tiny_model(config), FrameSpan(0, frames)
    # torch counts the products of the plain formula, not those inside the CPU's fused attention.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(noised, cond, span, FullPath(model.rule, kernels(), span))
    tokens = (noised.video.shape[-1] // config.video.patch) * (noised.video.shape[-2] // config.video.patch)
    counted = forward_flops(config, frames, tokens, TEXT_TOKENS)
    batch = noised.video.shape[0]
    assert counter.get_total_flops() == pytest.approx(batch * counted.total, rel=1e-12)


def test_mova_lite_is_as_the_model_table_says() -> None:
    """Video tower about 67.1 TFLOP at 21 frames of 1024 tokens without text; bridge 1.9, audio 0.3, structure 0.05."""
    config = build_model_config("mova-lite", struct_dim=70, audio_dim=1024)
    config = config.model_copy(update={"frames_per_chunk": 1})
    assert forward_flops(config, 21, 1024, 512).total == pytest.approx(70.5e12, rel=0.03)
