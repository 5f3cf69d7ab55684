"""Damaged clips are told of once and counted over ranks and starts; ranks that share clips must agree on them."""

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
from dualforce.train.damage import Clip, DamageError, DamageReport
from megatron_ext.parallel.grid import ProcessGrid

CPU = torch.device("cpu")
A = Damaged(2, 0, "x.tar", "train-0001", "video", "shards/x.tar: sample 'train-0001': video: 1: expected 2")
B = Damaged(5, 0, "y.sums.safetensors", "train-0004", "checksums", "y")
OTHER = Damaged(4, 1, "x.tar", "train-0001", "", "z")  # of the same name in another set


def report(
    folder: Path, found: list[Damaged], grid: ProcessGrid, most: int = 9, start: int = 0, before: tuple[Clip, ...] = ()
) -> DamageReport:
    return DamageReport(folder, SimpleNamespace(damaged=found), grid, most, start, before)  # type: ignore[arg-type]


def lines(folder: Path, rank: int = 0) -> list[Damaged]:
    path = folder / f"damaged-{rank:05d}.jsonl"
    return [Damaged(**json.loads(line)) for line in path.read_text().splitlines()]


class Ranks:
    """Stands in for the other ranks of this process: they have met what `others` says, and nothing after it."""

    def __init__(self, *others: list[Damaged]) -> None:
        self.others, self.calls = [[(one.step, one.bucket, one.key) for one in found] for found in others], 0

    def all_reduce(self, count: torch.Tensor, group: Any) -> None:
        count += sum(map(len, self.others))

    def all_gather_object(self, into: list[Any], own: Any, group: Any) -> None:
        into[:] = [own, *self.others]
        self.others, self.calls = [[] for _ in self.others], self.calls + 1


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(*others: list[Damaged]) -> Ranks:
        made = Ranks(*others)
        for name in ("all_reduce", "all_gather_object"):
            monkeypatch.setattr(damage.dist, name, getattr(made, name))
        return made

    return use


def test_each_is_told_once_when_its_step_is_done(tmp_path: Path) -> None:
    checked = report(tmp_path, [A, B], ProcessGrid.single())
    assert [checked.check(steps) for steps in (2, 3, 5, 6, 9)] == [0, 1, 1, 2, 2]
    assert lines(tmp_path) == [A, B]
    line = json.loads((tmp_path / "damaged-00000.jsonl").read_text().splitlines()[0])
    assert line.pop("reason") == A.reason
    assert line == {"step": 2, "bucket": 0, "shard": "x.tar", "key": "train-0001", "member": "video"}
    assert checked.clips == [(0, "train-0001"), (0, "train-0004")]


def test_nothing_is_written_where_nothing_may_be_damaged(tmp_path: Path) -> None:
    assert report(tmp_path, [], ProcessGrid.single(), most=0).check(9) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("other", "named"), [([], "train-0001"), ([A, B], "train-0004")])
def test_ranks_that_disagree_stop(tmp_path: Path, ranks: Any, other: list[Damaged], named: str) -> None:
    ranks(other)
    with pytest.raises(ShardError, match=f"sample '{named}': step .*could be read by some of the 2 ranks") as error:
        report(tmp_path, [A], ProcessGrid(2, 0, 2, CPU)).check(9)
    assert "\n" not in str(error.value)


def test_ranks_with_other_clips_need_not_agree_and_are_counted_together(tmp_path: Path, ranks: Any) -> None:
    """One clip that two ranks met, in different epochs, is one clip."""
    met = ranks([A, OTHER])
    checked = report(tmp_path, [A._replace(step=7), B], ProcessGrid(2, 0, 1, CPU))
    assert [checked.check(steps) for steps in (8, 9)] == [3, 3]
    assert checked.clips == [(0, "train-0001"), (0, "train-0004"), (1, "train-0001")]
    assert met.calls == 1  # names go over the net where there are new ones


def test_the_limit_is_that_of_all_ranks_together(tmp_path: Path, ranks: Any) -> None:
    ranks([OTHER])
    assert report(tmp_path, [], ProcessGrid(2, 0, 1, CPU), most=1).check(9) == 1
    ranks([OTHER])
    with pytest.raises(DamageError, match=r"data\.max_damaged: 1: 2 damaged clips over all ranks .*: expected no more"):
        report(tmp_path, [A], ProcessGrid(2, 0, 1, CPU), most=1).check(9)


def test_what_a_checkpoint_counts_goes_on_and_is_not_told_again(tmp_path: Path) -> None:
    (tmp_path / "damaged-00000.jsonl").write_text("".join(json.dumps(one._asdict()) + "\n" for one in (A, B)))
    (tmp_path / "damaged-00003.jsonl").write_text(json.dumps(B._asdict()) + "\n")  # of a rank there was
    again = [A._replace(step=6), B]
    checked = report(tmp_path, again, ProcessGrid.single(), start=4, before=((0, A.key),))
    assert lines(tmp_path) == [A] and lines(tmp_path, 3) == []  # step 5 comes again
    assert checked.check(5) == 1 and checked.check(7) == 2
    assert lines(tmp_path) == [A, B]


def test_a_run_that_begins_anew_begins_its_list_anew(tmp_path: Path) -> None:
    (tmp_path / "damaged-00000.jsonl").write_text(json.dumps(A._asdict()) + "\n" + '{"step": 1, "ke')
    report(tmp_path, [], ProcessGrid.single())
    assert lines(tmp_path) == []
