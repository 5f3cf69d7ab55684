"""A video that kills the process that reads it costs itself only."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from dualforce.preprocess import pool
from dualforce.preprocess.process import Job, Outcome
from dualforce.preprocess.quality import Limits


def fake_process(job: Job) -> Outcome:
    if job.source == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    return Outcome(job.source, (job.scratch / job.key,))


def test_a_dead_worker_is_one_rejection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pool, "process_video", fake_process)
    names = ["a", "deadly", "b", "c"]
    jobs = [Job(tmp_path, name, name, name, "", 0, 64, Limits(), None, None, tmp_path) for name in names]
    outcomes = {outcome.source: outcome for outcome in pool.run_jobs(jobs, 2)}
    assert sorted(outcomes) == sorted(names)
    assert [entry["reason"] for entry in outcomes["deadly"].rejected] == ["E_CRASH"]
    assert not outcomes["deadly"].samples
    for name in ("a", "b", "c"):
        assert outcomes[name].samples == (tmp_path / name,) and not outcomes[name].rejected
