"""Work that every rank does for itself and that one of them may have to refuse: all of them end alike, none waits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from dualforce.config import ConfigError
from megatron_ext.parallel.grid import ProcessGrid

Result = TypeVar("Result")


class AgreedError(ConfigError):
    """One that every rank raises with the same words, so that one of them may speak for all."""


def together(grid: ProcessGrid, work: Callable[[], Result]) -> Result:
    """What `work` returns on this rank; where it raises ValueError on some, AgreedError with the first rank's words on
    all of them. Collective: `work` itself must not be."""
    result, error = _attempt(work)
    _raise_first([told for told, _ in _exchanged(grid, (error, None))])
    return result  # type: ignore[return-value]  # no error, so there is a result


def gathered(grid: ProcessGrid, work: Callable[[], Result]) -> list[Result]:
    """As `together`, but what `work` returns on each rank, on all of them: small things that pickle."""
    result, error = _attempt(work)
    found = _exchanged(grid, (error, result))
    _raise_first([told for told, _ in found])
    return [one for _, one in found]  # type: ignore[misc]


def _attempt(work: Callable[[], Result]) -> tuple[Result | None, str | None]:
    try:
        return work(), None
    except ValueError as wrong:  # ConfigError, and what codecs and kernels raise
        return None, str(wrong)


def _exchanged(grid: ProcessGrid, own: tuple[str | None, Result | None]) -> list[tuple[str | None, Result | None]]:
    found = [own] * grid.world
    if grid.world > 1:
        try:
            dist.all_gather_object(found, own, group=grid.world_group)
        except RuntimeError:  # a rank has died; what this one has to say is worth more
            _raise_first([own[0]])
            raise
    return found


def _raise_first(errors: list[str | None]) -> None:
    first = next((one for one in errors if one is not None), None)
    if first is not None:
        raise AgreedError(first)
