"""A manifest lists as many rejections as readers take, and counts the others: a build must not fail at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.people_shards import write_people

from data_shards.check import find_faults
from data_shards.describe import describe_set
from data_shards.edit import drop, merge
from data_shards.manifest import NOT_LISTED
from data_shards.reader import ShardSet

COUNT = 170_000  # some 850,000 values, of which a reader takes 800,000


def rejections(count: int = COUNT) -> list[dict[str, Any]]:
    reasons = ("R_NOSPEECH", "R_CUT")
    fields = ("source", "reason", "detail", "window")
    return [dict(zip(fields, (f"{n // 10}.mp4", reasons[n % 2], "-", n % 10), strict=True)) for n in range(count)]


def test_what_has_no_room_is_counted_by_reason(tmp_path: Path) -> None:
    opened = ShardSet.open(write_people(tmp_path / "set", rejected=rejections(), info={"size": 32}))
    listed, info = opened.manifest["rejected"], opened.manifest["info"]
    assert 10_000 < len(listed) < COUNT and listed == rejections()[: len(listed)]
    assert sum(info[NOT_LISTED].values()) == COUNT - len(listed) and info["size"] == 32
    lines = describe_set(opened)
    assert [line.split() for line in lines if line.startswith("rejected")] == [
        ["rejected", "R_CUT", str(COUNT // 2)], ["rejected", "R_NOSPEECH", str(COUNT // 2)]]  # fmt: skip
    assert not find_faults(tmp_path / "set", samples=True).faults


def test_few_are_all_listed(tmp_path: Path) -> None:
    opened = ShardSet.open(write_people(tmp_path / "set", rejected=rejections(999)))
    assert opened.manifest["rejected"] == rejections(999) and opened.manifest["info"] == {}


def test_sets_made_out_of_sets_go_on_counting(tmp_path: Path) -> None:
    """Two lists that fit may not fit together; and what an earlier set counted stays counted."""
    for name, people in (("a", ("ann", "bob")), ("b", ("dan",))):
        write_people(tmp_path / name, train=people, rejected=rejections(COUNT // 2), validation=())
    merge(tmp_path / "both", [tmp_path / "a", tmp_path / "b"])
    merged = ShardSet.open(tmp_path / "both").manifest
    assert len(merged["rejected"]) + sum(merged["info"][NOT_LISTED].values()) == 2 * (COUNT // 2)
    drop(tmp_path / "both", tmp_path / "less", identities=["ann"])
    less = ShardSet.open(tmp_path / "less").manifest
    assert less["info"][NOT_LISTED] == merged["info"][NOT_LISTED] and less["rejected"] == merged["rejected"]
