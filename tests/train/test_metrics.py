"""Sums by noise level, the linear predictor, and the log of a run that is resumed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import torch

from dualforce.losses.total import LossCounts, LossMasks
from dualforce.train.metrics import RunLog, StepMetrics
from dualforce.train.train_module import StepInput, StepOutput
from dualforce.train.validate import Moments
from dualforce.types import Conditioning, FrameSigma, LossTerms, Noised, Velocity
from megatron_ext.parallel.grid import ProcessGrid


def micro_batch(sigma: list[float], errors: list[float], mask: list[bool]) -> tuple[StepInput, StepOutput]:
    """One clip with the given noise levels, errors and masks in both towers."""
    empty, levels = torch.empty(0), torch.tensor([sigma])
    flags = torch.tensor([mask])
    inputs = StepInput(
        noised=Noised(empty, empty, FrameSigma(levels, levels)),
        target=Velocity(empty, empty),
        cond=Conditioning(*[empty] * 6),
        clean_struct=empty,
        flame=empty,
        masks=LossMasks(flags, flags, empty, empty),
        counts=LossCounts(*[torch.ones(())] * 5),
    )
    found = torch.tensor([errors])
    terms = LossTerms(torch.tensor(2.0), torch.tensor(3.0), None, torch.tensor(0.5), torch.tensor(4.0))
    return inputs, StepOutput(terms, Velocity(found, found), Velocity(empty, empty), torch.tensor([1.0, 4.0]))


def test_errors_are_binned_by_noise_level_and_masked() -> None:
    metrics = StepMetrics(ProcessGrid.single())
    metrics.add(
        *micro_batch([0.05, 0.06, 0.95, 1.0, 0.5], [1.0, 3.0, 5.0, 7.0, 100.0], [True, True, True, True, False])
    )
    values = metrics.read(steps=1)
    assert values["video_by_sigma"][0] == 2.0
    assert values["video_by_sigma"][9] == 6.0  # 1.0 belongs to the last decile
    assert values["video_by_sigma"][5] is None
    assert values["lip_sync_accuracy"] == 0.25
    assert "flame" not in values


def test_reading_averages_over_steps_and_starts_anew() -> None:
    metrics = StepMetrics(ProcessGrid.single())
    for _ in range(4):
        metrics.add(*micro_batch([0.5], [1.0], [True]))
    assert metrics.read(steps=4)["video"] == 2.0
    metrics.add(*micro_batch([0.5], [1.0], [True]))
    assert metrics.read(steps=1)["total"] == 4.0


def test_linear_residual_is_that_of_least_squares() -> None:
    source = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 500, generator=source, dtype=torch.float64) + 0.7
    v = 0.3 * x - 1 + torch.randn(2, 3, 500, generator=source, dtype=torch.float64)
    n = torch.full((2, 3), 500.0, dtype=torch.float64)
    moments = Moments(n, x.sum(-1), v.sum(-1), (x * x).sum(-1), (x * v).sum(-1), (v * v).sum(-1))
    for level in range(2):
        for channel in range(3):
            design = numpy.stack([x[level, channel].numpy(), numpy.ones(500)], axis=1)
            _, residual, _, _ = numpy.linalg.lstsq(design, v[level, channel].numpy(), rcond=None)
            assert abs(float(moments.linear_residual()[level, channel]) - residual[0] / 500) < 1e-10


def test_resumed_log_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    first = RunLog(tmp_path, True, None)
    for step in range(1, 8):
        first.write("train", step, {"total": float(step)})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # killed while writing
    second = RunLog(tmp_path, True, 5)
    second.write("train", 6, {"total": 60.0})
    second.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["total"]) for line in lines] == [*((s, float(s)) for s in range(1, 6)), (6, 60.0)]


def test_a_run_that_begins_again_begins_its_log_again(tmp_path: Path) -> None:
    for total in (1.0, 2.0):
        log = RunLog(tmp_path, True, None)
        log.write("train", 1, {"total": total})
        log.close()
    assert [json.loads(line)["total"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [2.0]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path, False, None)
    log.write("train", 1, {"total": 1.0})
    log.close()
    assert not list(tmp_path.iterdir())
