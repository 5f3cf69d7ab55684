"""Damaged clips are told of once, and ranks that share clips must agree on them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_shards.schema import ShardError
from dualforce.data.steps import Damaged
from dualforce.train import damage
from dualforce.train.damage import DamageReport
from megatron_ext.parallel.grid import ProcessGrid

CPU = torch.device("cpu")
A, B = Damaged(2, "train-0001", "x.tar: sample 'train-0001': video: 1: expected 2"), Damaged(5, "train-0004", "y")


def report(folder: Path, found: list[Damaged], grid: ProcessGrid, possible: bool = True) -> DamageReport:
    return DamageReport(folder, SimpleNamespace(damaged=found), grid, possible)  # type: ignore[arg-type]


def test_each_is_told_once_when_its_step_is_done(tmp_path: Path) -> None:
    found = [A, B]
    checked = report(tmp_path, found, ProcessGrid.single())
    assert [checked.check(steps) for steps in (2, 3, 5, 6, 9)] == [0, 1, 1, 2, 2]
    lines = (tmp_path / "damaged-00000.jsonl").read_text().splitlines()
    assert [Damaged(**json.loads(line)) for line in lines] == [A, B]


def test_nothing_is_written_where_nothing_may_be_damaged(tmp_path: Path) -> None:
    assert report(tmp_path, [], ProcessGrid.single(), possible=False).check(9) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("other", "named"), [([], "train-0001"), ([A, B], "train-0004")])
def test_ranks_that_disagree_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: list[Damaged], named: str
) -> None:
    def gather(into: list[Any], own: Any, group: Any) -> None:
        into[:] = [own, [(one.step, one.key) for one in other]]

    monkeypatch.setattr(damage.dist, "all_gather_object", gather)
    grid = ProcessGrid(2, 0, 2, CPU)
    with pytest.raises(ShardError, match=f"sample '{named}': step .*could be read by some of the 2 ranks") as error:
        report(tmp_path, [A], grid).check(9)
    assert "\n" not in str(error.value)
