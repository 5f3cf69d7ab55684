"""The ranks of a run as a grid: data-parallel rows of sequence-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ProcessGrid:
    """`world` ranks as [dp, sp]; the ranks of one sequence-parallel group are neighbours and share their clips."""

    world: int
    rank: int
    sp: int
    device: torch.device
    sp_group: dist.ProcessGroup | None = None  # None when sp is 1
    side_group: dist.ProcessGroup | None = None  # the same ranks once more: exchanges of work that runs beside other
    world_group: dist.ProcessGroup | None = None  # None in a single process

    @property
    def dp(self) -> int:
        return self.world // self.sp

    @property
    def dp_rank(self) -> int:
        return self.rank // self.sp

    @property
    def sp_rank(self) -> int:
        return self.rank % self.sp

    def beside(self) -> ProcessGrid:
        """The grid for work on a second stream: a communicator takes its exchanges in one order only."""
        return replace(self, sp_group=self.side_group)

    @classmethod
    def single(cls, device: torch.device | None = None) -> ProcessGrid:
        """One process, no communication."""
        return cls(world=1, rank=0, sp=1, device=device or torch.device("cpu"))

    @classmethod
    def build(cls, sp: int, device: torch.device) -> ProcessGrid:
        """The grid of the initialised default group; every rank must call it. Raises ValueError when sp does not divide
        the world size."""
        world, rank = dist.get_world_size(), dist.get_rank()
        check_grid(world, sp)
        if world == 1:
            return cls.single(device)
        sp_group = side_group = None
        for ranks in torch.arange(world, device="cpu").view(-1, sp).tolist() if sp > 1 else []:
            groups = dist.new_group(ranks), dist.new_group(ranks)
            if rank in ranks:
                sp_group, side_group = groups
        return cls(world, rank, sp, device, sp_group, side_group, dist.group.WORLD)


def check_grid(world: int, sp: int) -> None:
    """Raise ValueError when `sp` ranks a clip do not fit `world` ranks."""
    if world % sp:
        legal = [size for size in range(1, world + 1) if world % size == 0]
        raise ValueError(f"parallel.sequence = {sp}: expected a divisor of the world size {world}: {legal}")


def check_heads(sp: int, heads: dict[str, int]) -> None:
    """Raise ValueError when a head count is not a multiple of `sp`; `heads` names each count."""
    wrong = {name: count for name, count in heads.items() if count % sp}
    if wrong:
        legal = [size for size in range(1, min(heads.values()) + 1) if all(n % size == 0 for n in heads.values())]
        shown = ", ".join(f"{name} = {count}" for name, count in wrong.items())
        raise ValueError(f"parallel.sequence = {sp}: does not divide {shown}; this model allows {legal}")
