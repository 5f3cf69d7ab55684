"""The reader benchmark on a tiny set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.fake_shards import write_fake_shards

from tools import bench_reader


def test_rows_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = write_fake_shards(tmp_path / "shards", clips=4, frames=5), tmp_path / "rows.json"
    arguments = ["x", str(root), "--frames", "3", "--seconds", "0.05", "--json", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    bench_reader.main()
    rows = json.loads(out.read_text())["rows"]
    assert [row["row"] for row in rows] == list(bench_reader.ROWS)
    assert all(row["clips/s"] > 0 and row["resident MB"] > 10 for row in rows)
    assert "4 clips of 5 latent frames, parts of 3" in capsys.readouterr().out


def test_rows_read_the_same_clips(tmp_path: Path) -> None:
    root = write_fake_shards(tmp_path / "shards", clips=4, frames=5)
    theirs = sorted(float(clip["video"].float().sum()) for clip in bench_reader._webdataset(root, 3)())
    ours = sorted(float(clip.video.float().sum()) for clip in bench_reader._ours(root, 3)())
    assert ours == theirs and len(ours) == 4


@pytest.mark.parametrize(("arguments", "named"), [(["nowhere"], "nowhere"), (["SET", "--frames", "6"], "--frames 6")])
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
        bench_reader.main()
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1 and named in error
