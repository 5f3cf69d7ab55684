"""The grid's arithmetic, and the exchanges of one process; those of several are tested with real processes."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.parallel.grid import ProcessGrid, check_grid, check_heads
from megatron_ext.parallel.ulysses import frames_to_heads, gather_frames, heads_to_frames, shard_frames

CPU = torch.device("cpu")


def test_exchanges_of_one_process_are_the_identity() -> None:
    grid = ProcessGrid.single()
    x = torch.randn(2, 3, 4, 6, 8)
    assert frames_to_heads(x, grid) is x and heads_to_frames(x, grid) is x and gather_frames(x, grid) is x
    assert torch.equal(shard_frames(x, grid), x)


def test_single() -> None:
    grid = ProcessGrid.single()
    assert (grid.world, grid.dp, grid.sp, grid.dp_rank, grid.sp_rank, grid.device) == (1, 1, 1, 0, 0, CPU)


def test_neighbours_share_their_clips() -> None:
    grids = [ProcessGrid(world=8, rank=rank, sp=2, device=CPU) for rank in range(8)]
    assert [(grid.dp_rank, grid.sp_rank) for grid in grids] == [(i, j) for i in range(4) for j in range(2)]
    assert {grid.dp for grid in grids} == {4}


def test_shards_are_runs_of_frames_in_order() -> None:
    x = torch.arange(2 * 6 * 3).view(2, 6, 3)
    parts = [shard_frames(x, ProcessGrid(world=6, rank=rank, sp=3, device=CPU)) for rank in (3, 4, 5)]
    assert torch.equal(torch.cat(parts, dim=1), x) and parts[0].shape == (2, 2, 3)


def test_frames_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="5 frames over 2 ranks: pad"):
        shard_frames(torch.zeros(1, 5, 2), ProcessGrid(world=2, rank=0, sp=2, device=CPU))


@pytest.mark.parametrize(("world", "sp"), [(4, 3), (2, 4), (1, 2)])
def test_degree_that_does_not_divide_the_world(world: int, sp: int) -> None:
    with pytest.raises(ValueError, match=rf"parallel.sequence = {sp}: expected a divisor of the world size {world}"):
        check_grid(world, sp)


def test_degrees_that_divide() -> None:
    for world, sp in ((1, 1), (4, 1), (4, 2), (4, 4), (6, 3)):
        check_grid(world, sp)


def test_degree_that_does_not_divide_the_heads() -> None:
    heads = {"video.heads": 12, "struct.heads": 8}
    for sp in (1, 2, 4):
        check_heads(sp, heads)
    with pytest.raises(ValueError, match=r"parallel.sequence = 3: does not divide struct.heads = 8; .* \[1, 2, 4\]"):
        check_heads(3, heads)
