"""A set that a manifest has no room for is refused when that is known, not after its last clip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.fake_shards import fake_extractors, fake_sample
from helpers.people_shards import write_people

from data_shards import files, manifest
from data_shards.edit import merge
from data_shards.files import MAX_JSON_BYTES, MAX_JSON_VALUES, parse_json
from data_shards.manifest import _TAR, RESERVE, Room, room_of, sealed
from data_shards.reader import ShardReader, ShardSet
from data_shards.schema import ShardError
from data_shards.writer import ShardSetWriter


def document(names: Sequence[str], tars: int) -> dict[str, Any]:
    """What grows with a set in its manifest."""
    shards = [f"validation-{number:06d}.tar" for number in range(tars)]
    sums = [f"{name.removesuffix('.tar')}.sums.safetensors" for name in shards]
    entry = {"bytes": 2**62, "sha256": "0" * 64}
    return {
        "splits": {"validation": {"identities": list(names), "samples": 2**20, "shards": shards}},
        "files": dict.fromkeys([*shards, *sums], entry),
    }


@pytest.mark.parametrize(
    ("name", "tars"),
    [("p,{:07d}", 9), ("{:07d}\u00fc\n" + "x" * 40, 0), ("{:07d}", 60_000)],
    ids=["many", "long", "tars"],
)
def test_what_has_room_can_be_read(name: str, tars: int) -> None:
    """As many identities as are let in, in the layout of a manifest."""
    one = Room().plus(name.format(0))
    limits = (MAX_JSON_BYTES, one.size), (MAX_JSON_VALUES, one.values)
    most = min(
        (limit - kept - tars * tar) // cost for (limit, cost), kept, tar in zip(limits, RESERVE, _TAR, strict=True)
    )
    assert 250_000 < most < MAX_JSON_VALUES
    names = [name.format(number) for number in range(most)]
    room = Room(most, most * one.size, most * one.values)
    room.check(tars, "here")
    assert room_of(names[:999] * 2) == Room(999, 999 * one.size, 999 * one.values)
    assert parse_json(sealed(document(names, tars), "here")[1], "here")
    with pytest.raises(
        ShardError, match=rf"^here: {most + 1} identities in {tars} tars: .*: expected at most "
    ) as error:
        room.plus(name.format(most)).check(tars, "here")
    assert "\n" not in str(error.value)


def test_writer_refuses_the_clip_that_is_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "MAX_JSON_VALUES", RESERVE[1] + 3 + 2 * 7)
    extractors = fake_extractors()
    with ShardSetWriter(tmp_path, extractors) as made:
        for number in range(3):
            made.add("train", fake_sample(f"k{number}", f"p{number}", extractors))
        made.add("train", fake_sample("again", "p1", extractors))
        with pytest.raises(ShardError, match=r"sample 'k3': 4 identities in 2 tars: .*: expected at most"):
            made.add("train", fake_sample("k3", "p3", extractors))
        made.finish([], {})
    assert len(ShardSet.open(tmp_path).split("train")) == 4


def test_merge_refuses_before_a_clip_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_people(tmp_path / "a", train=("ann", "bob"), validation=("cyd",))
    write_people(tmp_path / "b", train=("dan", "bob"), validation=())
    monkeypatch.setattr(manifest, "MAX_JSON_VALUES", RESERVE[1] + 3 + 2 * 7)
    monkeypatch.setattr(ShardReader, "read", lambda *_: pytest.fail("a clip was read"))
    with pytest.raises(ShardError, match=r"out: 4 identities in 2 tars: .*: expected at most"):
        merge(tmp_path / "out", [tmp_path / "a", tmp_path / "b"], prefix=True)
    assert not (tmp_path / "out").exists()


def test_rejections_get_what_identities_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of a manifest is theirs only where nothing else needs it."""
    monkeypatch.setattr(manifest, "RESERVE", (2**20, 1000))
    for module in (files, manifest):
        monkeypatch.setattr(module, "MAX_JSON_VALUES", 3000)
    people = [f"person {number}" for number in range(1900)]
    rejected = [{"source": f"{number}.mp4", "reason": "R_CUT", "detail": "-"} for number in range(900)]
    extractors = fake_extractors()
    with ShardSetWriter(tmp_path, extractors) as made:
        for number, name in enumerate(people):
            made.add("train", fake_sample(f"k{number}", name, extractors, frames=2))
        document = made.finish(rejected, {})
    assert 0 < len(document["rejected"]) < 400
    assert len(document["rejected"]) + document["info"]["rejected_not_listed"]["R_CUT"] == 900
    assert len(ShardSet.open(tmp_path).split("train")) == 1900
