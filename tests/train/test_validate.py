"""Validation does not depend on how its levels are dealt out to forwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_shards import write_fake_shards
from helpers.tiny_model import kernels, randomise

from data_shards.reader import ShardSet
from dualforce.config import RunConfig, validate
from dualforce.data.buckets import Buckets
from dualforce.data.statistics import StreamStatistics
from dualforce.model.path import ChunkRule
from dualforce.train import validate as validation
from dualforce.train.setup import _held_out, model_config
from dualforce.train.step import StepContext
from dualforce.train.train_module import TrainModule
from megatron_ext.parallel.grid import ProcessGrid


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_shards(tmp_path_factory.mktemp("shards"), clips=2, frames=5, validation_clips=3)


def measured(shards: Path, most: int, seen: list[int]) -> dict[str, Any]:
    """Validation at four levels with at most `most` clips a forward; `seen` gets the size of each."""
    values = {
        "preset": "tiny", "deepspeed": "x", "data": {"frames": 5, "max_micro_batch": most, "shards": str(shards)},
        "train": {"steps": 1, "validation_sigmas": 4, "validation_clips": 3},
    }  # fmt: skip
    run = validate(RunConfig, values, "test")
    found = ShardSet.open(shards)
    model = model_config(run, [found.manifest])
    module = randomise(TrainModule(model, run.loss, kernels(), None), 0)
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].target.video.shape[0]))
    statistics = StreamStatistics.from_manifest(found.manifest)
    held_out = validation.HeldOut(
        found.split("validation"), 5, "", statistics, model.audio.context, model.video.text_dim
    )
    context = StepContext(run, ProcessGrid.single(), kernels(), ChunkRule(model.frames_per_chunk, None, 0))
    return validation.validate(module, [held_out], context)


def test_no_forward_is_larger_than_in_training(shards: Path) -> None:
    sizes: list[int] = []
    whole = measured(shards, 8, sizes)
    assert sizes == [4, 4, 4]
    sizes.clear()
    parts = measured(shards, 3, sizes)
    assert sizes == [3, 1] * 3
    for name, value in whole.items():
        torch.testing.assert_close(torch.tensor(parts[name]), torch.tensor(value), rtol=1e-5, atol=1e-6)
    assert whole["video"] > 0 and len(whole["video_at_sigma"]) == 4


def test_several_sets_are_told_apart_and_together(tmp_path: Path) -> None:
    """Each alone equals a run on it alone; together, frames count equally."""
    sizes = {"small": (5, 4), "large": (3, 8)}
    roots = {
        name: write_fake_shards(tmp_path / name, clips=2, frames=5, height=side, width=side, seed=side)
        for name, (_, side) in sizes.items()
    }
    values = {
        "preset": "tiny", "deepspeed": "x", "data": {"frames": [5, 3], "shards": [str(r) for r in roots.values()]},
        "train": {"steps": 1, "validation_sigmas": 3, "validation_clips": 2},
    }  # fmt: skip
    run = validate(RunConfig, values, "test")
    buckets = Buckets([ShardSet.open(root) for root in roots.values()], run.data.lengths)
    model = model_config(run, [one.manifest for one in buckets.sets])
    module = randomise(TrainModule(model, run.loss, kernels(), None), 0)
    statistics = StreamStatistics.from_manifest(buckets.statistics())
    held_out = _held_out(buckets, statistics, model)
    context = StepContext(run, ProcessGrid.single(), kernels(), ChunkRule(model.frames_per_chunk, None, 0))
    together = validation.validate(module, held_out, context)
    alone = [validation.validate(module, [one], context) for one in held_out]
    assert [one.name for one in held_out] == ["32px-5f", "64px-3f"]
    for key in ("video", "struct", "video_linear", "video_zero"):
        assert [together[f"{key}/{one.name}"] for one in held_out] == [report[key] for report in alone]
        # Two clips each, of 4 and 2 noisy frames.
        assert together[key] == pytest.approx((4 * alone[0][key] + 2 * alone[1][key]) / 6, rel=1e-12)
    expected = (4 * torch.tensor(alone[0]["video_at_sigma"]) + 2 * torch.tensor(alone[1]["video_at_sigma"])) / 6
    torch.testing.assert_close(torch.tensor(together["video_at_sigma"]), expected)
    assert together["sigma"] == pytest.approx(alone[0]["sigma"])
    with pytest.raises(ValueError, match="no clips"):
        validation.validate(module, [], context)
