"""The benchmark of sets on a server, on a tiny one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.fake_shards import write_fake_shards

from tools import bench_remote


def test_rows_of_a_clean_and_a_faulty_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = write_fake_shards(tmp_path / "shards", clips=6, frames=5), tmp_path / "rows.json"
    arguments = ["x", str(root), "--clips", "40", "--rounds", "1", "--latency", "0.001", "--at-once", "4"]
    monkeypatch.setattr("sys.argv", [*arguments, "--json", str(out)])
    bench_remote.main()
    clean, faulty = json.loads(out.read_text())["rows"]
    assert (clean["server"], clean["faults"], clean["wrong"], clean["of clean"]) == ("clean", 0, 0, 1.0)
    assert faulty["server"] == "faulty" and faulty["faults"] > 3 and faulty["wrong"] == 0 and faulty["clips"] == 40
    assert faulty["requests"] > clean["requests"] >= 40 and faulty["of clean"] > 0
    assert "30% of requests fail" in capsys.readouterr().out


def test_a_wrong_sample_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_fake_shards(tmp_path / "shards", clips=3, frames=5)
    monkeypatch.setattr(bench_remote, "_same", lambda one, other: False)
    monkeypatch.setattr("sys.argv", ["x", str(root), "--clips", "4", "--rounds", "1", "--at-once", "1", "--rate", "0"])
    with pytest.raises(SystemExit) as left:
        bench_remote.main()
    assert left.value.code == 1


@pytest.mark.parametrize(("arguments", "named"), [(["nowhere"], "nowhere"), (["SET", "--rate", "1"], "--rate 1")])
def test_wrong_input_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    named: str,
) -> None:
    root = write_fake_shards(tmp_path / "shards", clips=1, frames=5)
    monkeypatch.setattr("sys.argv", ["x", *(str(root) if part == "SET" else part for part in arguments)])
    with pytest.raises(SystemExit) as left:
        bench_remote.main()
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1 and named in error
