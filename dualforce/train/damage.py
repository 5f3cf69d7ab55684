"""Clips that could not be read: a line for each in the run's folder, and a check that ranks which share them agree."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
import torch.distributed as dist

from data_shards.schema import ShardError
from dualforce.data.loader import StepLoader
from dualforce.data.steps import Damaged
from dualforce.train.step import PreparedStep
from megatron_ext.parallel.grid import ProcessGrid

logger = logging.getLogger(__name__)


class DamageReport:
    """Tells of the loader's damaged clips, once each, when the step that met them is done."""

    def __init__(self, run_dir: Path, loader: StepLoader[PreparedStep], grid: ProcessGrid, possible: bool) -> None:
        self._loader, self._grid, self._possible = loader, grid, possible
        self._path = run_dir / f"damaged-{grid.dp_rank:05d}.jsonl"
        self._told = 0

    def check(self, steps: int) -> int:
        """Clips of the first `steps` steps that could not be read, over all ranks; collective. New ones are appended to
        `damaged-RANK.jsonl`.

        Raises ShardError, on all ranks of a sequence-parallel group, where some of them could read a clip that others
        could not: they have then trained on different clips.
        """
        if not self._possible:
            return 0
        found = [one for one in self._loader.damaged if one.step < steps]
        self._agree(found)
        if self._grid.sp_rank == 0:
            self._tell(found[self._told :])
        self._told = len(found)
        count = torch.tensor([len(found) if self._grid.sp_rank == 0 else 0], device=self._grid.device)
        if self._grid.world > 1:
            dist.all_reduce(count, group=self._grid.world_group)
        return int(count)

    def _agree(self, found: list[Damaged]) -> None:
        if self._grid.sp == 1:
            return
        others: list[list[tuple[int, str]]] = [[] for _ in range(self._grid.sp)]
        dist.all_gather_object(others, [(one.step, one.key) for one in found], group=self._grid.sp_group)
        differing = sorted(set().union(*others) - set(others[0]).intersection(*others))
        if differing:
            step, key = differing[0]
            raise ShardError(
                f"sample {key!r}: step {step}: could be read by some of the {self._grid.sp} ranks that share it: "
                "expected all or none; go on from the last checkpoint with --resume"
            )

    def _tell(self, new: list[Damaged]) -> None:
        for one in new:
            logger.warning("damaged clip replaced: %s", one.reason)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(one._asdict()) + "\n")
