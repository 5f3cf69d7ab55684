"""Checkpoint partitions of any ZeRO stage become each other; whole runs are in tests/invariants/test_elastic.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from dualforce.config import ConfigError
from dualforce.train import partitions
from dualforce.train.gather_unit import ALIGN, Slot
from dualforce.train.partitions import Share, Stored, read_stored

SIZES = {"a.matrices": 3 * ALIGN, "b.matrices": ALIGN, "c.matrices": 5 * ALIGN}
UNITS = {name[0]: {"matrices": [Slot("weight", (numel,), 0)]} for name, numel in SIZES.items()}


def whole(name: str, key: str | None) -> Tensor:
    numbers = torch.arange(float(SIZES[name])) + 1000 * list(SIZES).index(name)
    return numbers if key is None else -numbers


def zero3_share(world: int, rank: int, fill: bool) -> Share:
    """A rank's parts one behind the other, each padded to an equal length."""
    parts = {name: -(-numel // world) for name, numel in SIZES.items()}
    weights, moment = torch.zeros(sum(parts.values())), torch.zeros(sum(parts.values()))
    pieces = list(partitions._zero3_pieces(SIZES, parts, rank))
    for name, start, at, numel in pieces if fill else ():
        weights[at : at + numel] = whole(name, None)[start : start + numel]
        moment[at : at + numel] = whole(name, "exp_avg")[start : start + numel]
    return Share(pieces, weights, {"exp_avg": moment, "step": torch.tensor(4.0)})


def stored(world: int) -> Stored:
    shares = [zero3_share(world, rank, True) for rank in range(world)]
    return Stored(partitions._by_name(shares, Path("run"), UNITS), [], ["exp_avg"], {}, {})


@pytest.mark.parametrize("old", [1, 2, 3, 5, 7, 12])  # of 12 ranks, the last have nothing of 64 elements
@pytest.mark.parametrize("new", [1, 2, 3, 4, 7, 12])
def test_every_part_comes_from_where_it_lay(old: int, new: int) -> None:
    """Also where parts are padded, and where a rank beyond the others has only padding."""
    source = stored(old)
    for rank in range(new):
        expected, found = zero3_share(new, rank, True), zero3_share(new, rank, False)
        for key in (None, "exp_avg"):
            for piece in found.pieces:
                source.copy_to(found.tensor(key), piece, key)
            assert torch.equal(found.tensor(key), expected.tensor(key))


def test_comparison_is_bit_for_bit() -> None:
    source, name = stored(3), "c.matrices"
    assert source.equal(name, None, whole(name, None))
    assert source.equal(name, "exp_avg", whole(name, "exp_avg"))
    assert not source.equal(name, "exp_avg", whole(name, None))
    changed = whole(name, None)
    changed[-1] = torch.nextafter(changed[-1], torch.tensor(0.0))
    assert not source.equal(name, None, changed)


def test_a_rank_too_few_is_named() -> None:
    shares = [zero3_share(3, rank, True) for rank in (0, 2)]
    with pytest.raises(ConfigError, match=r"a\.matrices is not whole; expected its 192 elements once"):
        partitions._by_name(shares, Path("run"), UNITS)
    twice = [zero3_share(3, rank, True) for rank in (0, 1, 1, 2)]
    with pytest.raises(ConfigError, match=r"a\.matrices is not whole"):
        partitions._by_name(twice, Path("run"), UNITS)


def test_a_gap_is_named_though_the_sum_is_right() -> None:
    """One part twice and another not at all."""
    shares = [zero3_share(3, rank, True) for rank in (0, 1, 1)]
    with pytest.raises(ConfigError, match=r"a\.matrices is not whole"):
        partitions._by_name(shares, Path("run"), UNITS)


def write_zero3(folder: Path, changed: dict[str, object]) -> None:
    """The files of two ranks of ZeRO-3 as far as they are read; rank 1's state with what is `changed`."""
    model = {"param_shapes": [{name: torch.Size([numel]) for name, numel in SIZES.items()}], "lr_scheduler": None,
             "global_steps": 4, "skipped_steps": 0}  # fmt: skip
    torch.save(model, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for rank in range(2):
        share = zero3_share(2, rank, True)
        state = {
            "partition_count": 2, "fp32_flat_groups": [share.weights],
            "optimizer_state_dict": {"param_groups": [{"params": [0], "lr": 1.0}], "state": {0: share.state}},
            **(changed if rank else {}),
        }  # fmt: skip
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def test_files_of_zero3_are_read(tmp_path: Path) -> None:
    write_zero3(tmp_path, {})
    found = read_stored(tmp_path, 3, False, 2, UNITS)
    assert all(found.equal(name, key, whole(name, key)) for name in SIZES for key in (None, "exp_avg"))
    assert found.keys == ["exp_avg"] and found.scalars == {"step": torch.tensor(4.0)}
    assert found.groups == [{"lr": 1.0}] and found.engine["global_steps"] == 4


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"partition_count": 3}, "3 parts to a parameter: expected one for each rank"),
        ({"fp32_flat_groups": [torch.zeros(8)]}, "8 weights: expected 288, the parameters' parts"),
    ],
)
def test_parts_that_are_not_those_of_the_ranks_are_refused(
    tmp_path: Path, changed: dict[str, object], named: str
) -> None:
    write_zero3(tmp_path, changed)
    with pytest.raises(ConfigError, match=named):
        read_stored(tmp_path, 3, False, 2, UNITS)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_zero3(tmp_path, {})
    (tmp_path / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(
        ConfigError, match=r"rank_1_mp_rank_00_optim_states\.pt: no such file; expected the files of ev"
    ):
        read_stored(tmp_path, 3, False, 2, UNITS)


def test_files_of_another_kind_are_refused_by_name(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (str(tmp_path / "executed"),)  # type: ignore[return-value]

    path = tmp_path / "mp_rank_00_model_states.pt"
    for content in (b"", b"x" * 100):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"mp_rank_00_model_states\.pt: cannot be read"):
            read_stored(tmp_path, 0, False, 1, UNITS)
    torch.save({"module": Hostile()}, path)
    with pytest.raises(ConfigError, match=r"mp_rank_00_model_states\.pt: cannot be read"):
        read_stored(tmp_path, 0, False, 1, UNITS)
    assert not (tmp_path / "executed").exists()
    torch.save({"module": {}}, path)
    with pytest.raises(ConfigError, match=r"not a checkpoint that DeepSpeed 0\.19\.8 writes: KeyError"):
        read_stored(tmp_path, 0, False, 1, UNITS)
