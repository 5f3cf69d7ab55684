"""Clips that could not be read: a line for each in the run's folder, a bound on their number over all ranks and all
starts of the run, and a check that ranks which share clips agree on them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist

from data_shards.schema import ShardError
from dualforce.data.loader import StepLoader
from dualforce.data.steps import Damaged
from dualforce.train.metrics import drop_after
from dualforce.train.step import PreparedStep
from megatron_ext.parallel.grid import ProcessGrid

logger = logging.getLogger(__name__)
Clip = tuple[int, str]  # number of the set in data.shards, and key
_Met = tuple[int, int, str]  # step, and the clip


class DamageError(ShardError):
    """Damage that ends the run; all ranks meet it together."""


class DamageReport:
    """Tells of the loader's damaged clips, once each, when the step that met them is done, and counts them: different
    clips over all ranks since the run began, at most `most` (data.max_damaged).

    `before`: those that the checkpoint of `start` steps counts already. What an earlier start of the run has written
    of later steps is removed from its files.
    """

    def __init__(
        self, run_dir: Path, loader: StepLoader[PreparedStep], grid: ProcessGrid, most: int, start: int = 0,
        before: Iterable[Clip] = (),
    ) -> None:  # fmt: skip
        self._loader, self._grid, self._most, self._run_dir = loader, grid, most, run_dir
        self._path = run_dir / f"damaged-{grid.dp_rank:05d}.jsonl"
        self._clips: set[Clip] = set(before)
        self._told = 0
        self._drop_after(start)

    @property
    def clips(self) -> list[Clip]:
        """Those counted so far, in order: the same on all ranks."""
        return sorted(self._clips)

    def check(self, steps: int) -> int:
        """How many different clips of the first `steps` steps could not be read, over all ranks; collective. New ones
        are appended to `damaged-RANK.jsonl`.

        Raises DamageError, on all ranks: for more than `most`, and where some ranks of a sequence-parallel group could
        read a clip that others could not, which have then trained on different clips.
        """
        if not self._most:
            return 0
        found = [one for one in self._loader.damaged if one.step < steps]
        new, self._told = found[self._told :], len(found)
        everyone = self._gathered([(one.step, one.bucket, one.key) for one in new])
        for first in range(0, len(everyone), self._grid.sp):
            self._agree(everyone[first : first + self._grid.sp])
        if self._grid.sp_rank == 0:
            self._tell([one for one in new if (one.bucket, one.key) not in self._clips])
        self._clips.update((bucket, key) for met in everyone for _, bucket, key in met)
        if len(self._clips) > self._most:
            raise DamageError(
                f"data.max_damaged: {self._most}: {len(self._clips)} damaged clips over all ranks since the run began: "
                f"expected no more (they are in {self._run_dir / 'damaged-*.jsonl'})"
            )
        return len(self._clips)

    def _gathered(self, own: list[_Met]) -> list[list[_Met]]:
        """What every rank met; nothing where no rank has met any."""
        if self._grid.world == 1:
            return [own]
        count = torch.tensor([len(own)], device=self._grid.device)
        dist.all_reduce(count, group=self._grid.world_group)
        if not int(count):
            return []
        everyone: list[list[_Met]] = [[] for _ in range(self._grid.world)]
        dist.all_gather_object(everyone, own, group=self._grid.world_group)
        return everyone

    def _agree(self, group: list[list[_Met]]) -> None:
        differing = sorted(set().union(*group) - set(group[0]).intersection(*group))
        if differing:
            step, _, key = differing[0]
            raise DamageError(
                f"sample {key!r}: step {step}: could be read by some of the {self._grid.sp} ranks that share it: "
                "expected all or none; go on from the last checkpoint with --resume"
            )

    def _tell(self, new: list[Damaged]) -> None:
        for one in new:
            logger.warning("damaged clip replaced: %s", one.reason)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(one._asdict()) + "\n")

    def _drop_after(self, start: int) -> None:
        """Each rank of its own file, the first also of those of ranks that the run has no longer."""
        if self._grid.sp_rank:
            return
        others = self._run_dir.glob("damaged-*.jsonl") if self._grid.rank == 0 else ()
        gone = (path for path in others if path.stem[8:].isdigit() and int(path.stem[8:]) >= self._grid.dp)
        for path in (self._path, *gone):
            if path.exists():
                drop_after(path, start - 1)  # steps count from 0 here
