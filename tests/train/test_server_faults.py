"""A server's fault is told of by the rank that meets it, whichever it is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from data_shards.remote.fetch import RemoteError
from dualforce.train import __main__ as command

TINY = Path(__file__).resolve().parents[2] / "ds_configs" / "runs" / "tiny.json"


def test_a_rank_that_is_not_the_first_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def meets_a_fault(*_: object) -> None:
        raise RemoteError("https://host/set: 503: expected 200")

    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(command, "_prepare", meets_a_fault)
    monkeypatch.setattr(sys, "argv", ["dualforce.train", "--run", str(TINY), "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: https://host/set: 503: expected 200\n"
