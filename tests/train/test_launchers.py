"""The launchers that the documentation names start the same run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.fake_shards import write_fake_shards

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {
    # torchrun would take `--run` for an abbreviation of its own `--run-path`, hence the bare `--`.
    "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "dualforce.train", "--"],
    "deepspeed": ["-m", "tools.launch_local", "--processes", "2"],
    "python": ["-m", "dualforce.train"],
}


@pytest.mark.timeout(900)
def test_all_launchers_train_alike(tmp_path: Path) -> None:
    """Two ranks of any launcher, bit for bit; one process up to the order of sums."""
    shards = write_fake_shards(tmp_path / "shards", clips=4, frames=5)
    values = [f"data.shards={shards}", "data.frames=5", "data.clips_per_step=2", "train.steps=3", "train.log_every=1"]
    sets = [item for value in [*values, "train.validation_sigmas=2"] for item in ("--set", value)]
    run = ["--run", str(ROOT / "ds_configs" / "runs" / "tiny.json"), *sets]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    losses = {}
    for name, launcher in LAUNCHERS.items():
        command = [sys.executable, *launcher, *run, "--out", str(tmp_path / name)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{name}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["total"] for line in lines if line["kind"] == "train"]
    assert losses["torchrun"] == losses["deepspeed"]
    assert losses["python"] == pytest.approx(losses["deepspeed"], rel=1e-5)
    assert len(set(losses["python"])) == 3
