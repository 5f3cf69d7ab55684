"""The reader benchmark on a tiny set."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_shards import write_fake_shards

from data_shards.reader import ShardSet
from tools import bench_reader


def test_rows_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = write_fake_shards(tmp_path / "shards", clips=4, frames=5), tmp_path / "rows.json"
    arguments = ["x", str(root), "--frames", "3", "--seconds", "0.05", "--rounds", "2", "--json", str(out)]
    monkeypatch.setattr("sys.argv", arguments)
    bench_reader.main()
    rows = json.loads(out.read_text())["rows"]
    names = ["ours", "ours, first time", "webdataset"]
    assert [row["row"] for row in rows] == [*names, *(f"{name}, batches" for name in names)]
    assert {row["frames"] for row in rows} == {3}
    assert all(row["of webdataset"] == 1 for row in rows if row["row"].startswith("webdataset"))
    assert all(row["clips a cpu second"] > 0 and row["resident MB"] > 10 for row in rows)
    assert "4 clips of 5 latent frames" in capsys.readouterr().out


@pytest.mark.parametrize("streams", [{}, {"flame": True, "text_dim": 3}], ids=["plain", "flame_text"])
def test_rows_read_the_same_tensors(tmp_path: Path, streams: dict[str, Any]) -> None:
    root = write_fake_shards(tmp_path / "shards", clips=4, frames=5, shard_bytes=1, **streams)
    first = partial(bench_reader.read_ours, first=True)
    readers: Any = (bench_reader.read_ours, first, bench_reader.read_webdataset)
    for frames in (3, 5):
        both = [list(read(root, frames)()) for read in readers]
        ours, fresh, theirs = (sorted(clips, key=lambda clip: float(clip["video"].sum())) for clips in both)
        assert len(ours) == len(fresh) == len(theirs) == 4
        for one, new, other in zip(ours, fresh, theirs, strict=True):
            other.pop("__key__")  # webdataset adds it
            assert one.keys() == new.keys() == other.keys()
            for name in one:
                assert torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype
                assert torch.equal(new[name], other[name])


@pytest.mark.parametrize("streams", [{}, {"flame": True, "text_dim": 3}], ids=["plain", "flame_text"])
def test_batches_hold_the_same_tensors(tmp_path: Path, streams: dict[str, Any]) -> None:
    root = write_fake_shards(tmp_path / "shards", clips=5, frames=5, shard_bytes=1, **streams)
    for frames in (3, 5):
        ours = list(bench_reader.read_ours(root, frames, 2)())
        theirs = list(bench_reader.read_webdataset(root, frames, 2)())
        assert [len(batch.video) for batch in ours] == [len(batch["video"]) for batch in theirs] == [2, 2, 1]
        names = [name for name in theirs[0] if name != "__key__"]
        assert len(names) == (8 if streams else 5)
        for name in names:
            one = torch.cat([getattr(batch, name) for batch in ours])
            other = torch.cat([batch[name] for batch in theirs])
            assert one.shape == other.shape and one.dtype == other.dtype
            assert _sorted(one) == _sorted(other)


def _sorted(clips: torch.Tensor) -> list[bytes]:
    return sorted(clip.contiguous().numpy().tobytes() for clip in clips)


def test_first_batch_of_a_set_that_it_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "large"
    monkeypatch.setattr("tools.bench.first_batch.REPEATS", 1)
    monkeypatch.setattr("sys.argv", ["x", str(root), "--open", "--tars", "3", "--clips", "5"])
    bench_reader.main()
    assert "3 tars of 5 clips" in capsys.readouterr().out
    opened = ShardSet.open(root)
    opened.verify()
    reader = opened.split("train")
    assert len({reader.read(index).key for index in range(len(reader))}) == 15
    monkeypatch.setattr("sys.argv", ["x", str(root), "--open", "--tars", "4", "--clips", "5"])
    with pytest.raises(SystemExit):
        bench_reader.main()
    assert "15 clips in 3 tars: expected 20 in 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["nowhere"], "nowhere"), (["SET", "--frames", "6"], "--frames 6"), (["SET", "--batch", "0"], "--batch 0")],
)
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
