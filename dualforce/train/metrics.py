"""What a run reports: sums kept on the device, reduced once per log interval, to JSON lines and TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from dualforce.train.train_module import StepInput, StepOutput
from megatron_ext.parallel.grid import ProcessGrid

TERMS = ("video", "struct", "flame", "lip_sync")
DECILES = 10


class StepMetrics:
    """Sums of the loss shares, of the errors by noise-level decile and tower, of lip-sync hits since the last read."""

    def __init__(self, grid: ProcessGrid) -> None:
        self._grid = grid
        # One vector, so that a log interval costs one reduction: terms, total, hits, rows, then error and count by
        # tower and decile.
        self._sums = torch.zeros(len(TERMS) + 3 + 4 * DECILES, dtype=torch.float64, device=grid.device)
        self._present = [False] * len(TERMS)

    def add(self, inputs: StepInput, output: StepOutput) -> None:
        """Take in one micro-batch; stays on the device."""
        zero = output.lip.new_zeros(())
        terms = [getattr(output.terms, name) for name in TERMS]
        self._present = [term is not None for term in terms]
        shares = [zero if term is None else term.detach() for term in terms]
        head = [*shares, output.terms.total.detach() / self._grid.world, *output.lip]
        parts = [torch.stack([x.double() for x in head])]
        for name in ("video", "struct"):
            sigma, mask = getattr(inputs.noised.sigma, name), getattr(inputs.masks, name).double()
            decile = (sigma * DECILES).long().clamp_max(DECILES - 1)
            bins = torch.nn.functional.one_hot(decile, DECILES).double() * mask[..., None]
            errors = getattr(output.errors, name).double()
            parts += [(bins * errors[..., None]).sum((0, 1)), bins.sum((0, 1))]
        self._sums += torch.cat(parts)

    def read(self, steps: int) -> dict[str, Any]:
        """Means over the last `steps` steps and all ranks; collective, and the one synchronisation of the interval."""
        if self._grid.world > 1:
            dist.all_reduce(self._sums, group=self._grid.world_group)
        values = self._sums.tolist()
        self._sums.zero_()
        n = len(TERMS)
        found: dict[str, Any] = {name: values[i] / steps for i, name in enumerate(TERMS) if self._present[i]}
        found["total"] = values[n] / steps
        if self._present[TERMS.index("lip_sync")] and values[n + 2]:
            found["lip_sync_accuracy"] = values[n + 1] / values[n + 2]
        deciles = [values[n + 3 + i * DECILES : n + 3 + (i + 1) * DECILES] for i in range(4)]
        for name, errors, counts in (("video", *deciles[:2]), ("struct", *deciles[2:])):
            found[f"{name}_by_sigma"] = [e / c if c else None for e, c in zip(errors, counts, strict=True)]
        return found


class RunLog:
    """Writes metrics on rank 0; the other ranks' calls do nothing. One JSON object a line, and TensorBoard."""

    def __init__(self, run_dir: Path, main: bool, resume_step: int | None) -> None:
        self._main = main
        if not main:
            return
        path = run_dir / "metrics.jsonl"
        if resume_step is not None and path.exists():
            drop_after(path, resume_step)
        # A run that begins again before its first checkpoint begins its log again; purge_step hides the same from
        # TensorBoard, whose files are only ever added to.
        self._file = path.open("w" if resume_step is None else "a", encoding="utf-8")
        first = 0 if resume_step is None else resume_step + 1
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Log one record; numbers become scalars, lists of numbers one scalar an entry."""
        if not self._main:
            return
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            entries = {f"{name}/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
            for key, number in entries.items():
                if isinstance(number, (int, float)):
                    self._board.add_scalar(f"{kind}/{key}", number, step)

    def image(self, name: str, step: int, picture: Tensor) -> None:
        """Log a picture, uint8 [H,W,3]."""
        if self._main:
            self._board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close."""
        if self._main:
            self._file.close()
            self._board.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except ValueError:  # an interrupted run may have been cut off in the middle of its last line
        return math.inf


def drop_after(path: Path, step: int) -> None:
    """Remove the records of later steps than `step` from a file of JSON lines, and a last line that was cut off."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    kept = [line for line in lines if _step_of(line) <= step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)
