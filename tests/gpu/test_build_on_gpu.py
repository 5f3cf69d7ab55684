"""Shards whose speech features come from GPUs: the same whichever worker made them, and near those of the CPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers.set_files import set_bytes

from data_shards.reader import ShardSet
from dualforce.preprocess.build import BuildOptions, build_shards

pytestmark = pytest.mark.gpu


def test_builds_on_gpus(tmp_path: Path, sample_dir: Path, whisper_folder: Path) -> None:
    pytest.importorskip("transformers")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for path in sorted(sample_dir.glob("id0[0-5].*")):
        shutil.copy(path, tmp_path)
    gpus = tuple(f"cuda:{index}" for index in range(torch.cuda.device_count()))
    common = {"size": 64, "audio_encoder": whisper_folder}
    build_shards(tmp_path, tmp_path / "one", BuildOptions(**common, devices=gpus[:1], workers=1))
    build_shards(tmp_path, tmp_path / "all", BuildOptions(**common, devices=gpus[::-1], workers=len(gpus) + 2))
    assert set_bytes(tmp_path / "one") == set_bytes(tmp_path / "all")
    build_shards(tmp_path, tmp_path / "cpu", BuildOptions(**common, workers=2))
    ours, theirs = (ShardSet.open(tmp_path / name).split("train").read(0) for name in ("one", "cpu"))
    assert ours.key == theirs.key and torch.equal(ours.video, theirs.video)
    error = (ours.audio.float() - theirs.audio.float()).norm() / theirs.audio.float().norm()
    assert error < 5e-3
