"""What the training command refuses before anything is started; whole runs are in tests/invariants/test_runs.py."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.checkpoint_folder import write_checkpoint
from helpers.fake_shards import write_fake_shards

from data_shards.reader import ShardSet
from dualforce.config import ConfigError, LossConfig
from dualforce.data.buckets import Buckets
from dualforce.train.__main__ import _check_out, _with_flame, statistics_of_run
from dualforce.train.checkpoint import SavedState


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError, match="is a file; expected a folder"):
        _check_out(tmp_path / "out", resume=False)


def test_a_run_killed_in_its_first_checkpoint_begins_again(tmp_path: Path) -> None:
    """There is nothing to resume from, so that it has to be possible to start."""
    (tmp_path / "checkpoints" / "step-000005").mkdir(parents=True)
    _check_out(tmp_path, resume=False)
    with pytest.raises(ConfigError, match=r"--resume, but there is no .*LATEST: expected a complete checkpoint"):
        _check_out(tmp_path, resume=True)
    (tmp_path / "checkpoints" / "LATEST").write_text("step-000005\n")
    _check_out(tmp_path, resume=True)
    with pytest.raises(ConfigError, match="holds checkpoints; add --resume"):
        _check_out(tmp_path, resume=False)


def write_run(out: Path, begun_on: ShardSet, **state: Any) -> None:
    """A run folder with a checkpoint, as far as the choice of shards goes."""
    kept = {key: begun_on.manifest[key] for key in ("extractors", "statistics")}
    write_checkpoint(out, SavedState(5, 1, 1, 0, {}, {}, {}, "x", config=kept, **state))


def test_a_run_goes_on_with_its_own_shards_unless_told_otherwise(tmp_path: Path) -> None:
    """Widths and tags agree, so that nothing later would notice. The statistics stay those of the run's beginning."""
    own, other = (ShardSet.open(write_fake_shards(tmp_path / str(seed), clips=2, seed=seed)) for seed in (0, 1))
    moved = ShardSet.open(shutil.copytree(own.root, tmp_path / "moved"))
    write_run(tmp_path, own, shards=own.hash)
    assert own.manifest["statistics"] != other.manifest["statistics"]
    for shards, allowed in ((own, False), (moved, False), (own, True), (other, True)):
        assert statistics_of_run(tmp_path, Buckets([shards], [2]), allowed) == own.manifest["statistics"]
    named = f"step 5: shards: {own.hash}: expected {other.hash}, .*allow_new_shards"
    with pytest.raises(ConfigError, match=named) as error:
        statistics_of_run(tmp_path, Buckets([other], [2]), False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stream", ["motion", "video"])
def test_other_extractors_are_refused_always(tmp_path: Path, stream: str) -> None:
    """Weights mean nothing under them."""
    shards = ShardSet.open(write_fake_shards(tmp_path / "shards", clips=2))
    write_run(tmp_path, shards, shards=shards.hash)
    manifest = copy.deepcopy(shards.manifest)
    manifest["extractors"][stream]["tag"] = "other-v1"
    other = Buckets([ShardSet(shards.source, manifest)], [2])
    with pytest.raises(ConfigError, match=r"extractors differ from those of data\.shards"):
        statistics_of_run(tmp_path, other, True)


def test_a_run_that_took_flame_as_stored_goes_on_once_its_loss_has_ended(tmp_path: Path) -> None:
    shards = ShardSet.open(write_fake_shards(tmp_path / "shards", clips=2, flame=True))
    write_run(tmp_path, shards, shards=shards.hash)
    now, earlier = dict(shards.manifest["statistics"]), dict(shards.manifest["statistics"])
    del earlier["flame"]

    def resumed(**loss: Any) -> dict[str, Any]:
        return _with_flame(earlier, SimpleNamespace(loss=LossConfig(**loss)), tmp_path, Buckets([shards], [2]))  # type: ignore[arg-type]

    assert resumed(flame=0.0) == resumed(flame=0.1, flame_steps=5) == now
    with pytest.raises(ConfigError, match=r"checkpoint of step 5: statistics.flame: absent: .*begin a new") as error:
        resumed(flame=0.1, flame_steps=6)
    assert "\n" not in str(error.value)
    kept = {**earlier, "flame": {"mean": [1.0], "std": [2.0]}}
    assert _with_flame(kept, SimpleNamespace(loss=LossConfig()), tmp_path, shards) == kept  # type: ignore[arg-type]


def test_a_run_without_flame_has_no_statistics_of_it(tmp_path: Path) -> None:
    shards = ShardSet.open(write_fake_shards(tmp_path / "shards", clips=2))
    found = shards.manifest["statistics"]
    run: Any = SimpleNamespace(loss=LossConfig())
    assert _with_flame(found, run, tmp_path, Buckets([shards], [2])) is found
