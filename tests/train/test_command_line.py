"""What the training command refuses before anything is started; whole runs are in tests/invariants/test_runs.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.fake_shards import write_fake_shards

from data_shards.reader import ShardSet
from dualforce.config import ConfigError
from dualforce.train.__main__ import _check_out, _check_same_shards


def test_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(ConfigError, match="is a file; expected a folder"):
        _check_out(tmp_path / "out", resume=False)


def test_a_run_goes_on_with_its_own_shards_only(tmp_path: Path) -> None:
    """Widths agree in both cases, so that nothing later would notice."""
    manifest = ShardSet.open(write_fake_shards(tmp_path / "shards", clips=2)).manifest
    kept = {key: manifest[key] for key in ("extractors", "statistics")}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    _check_same_shards(tmp_path, manifest)
    motion = {**manifest["extractors"]["motion"], "tag": "other-v1"}
    with pytest.raises(ConfigError, match=r"extractors differ from those of data\.shards"):
        _check_same_shards(tmp_path, {**manifest, "extractors": {**manifest["extractors"], "motion": motion}})
    other = ShardSet.open(write_fake_shards(tmp_path / "other", clips=2, seed=1)).manifest
    with pytest.raises(ConfigError, match=r"statistics differ from those of data\.shards"):
        _check_same_shards(tmp_path, other)
