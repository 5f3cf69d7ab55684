"""Sets made out of sets hold the same clips, are the same every time, and leave nothing of what was dropped."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from helpers.fake_shards import fake_extractors, fake_sample
from helpers.people_shards import file_bytes, read_clips, write_people

from data_shards.edit import check_out, drop, merge, side_of, split
from data_shards.moments import StreamMoments
from data_shards.reader import ShardReader, ShardSet
from data_shards.schema import ClipSample, ShardError
from data_shards.writer import ShardSetWriter

STREAMS: dict[str, dict[str, Any]] = {"plain": {}, "flame": {"flame": True}, "all": {"flame": True, "text_dim": 5}}


@pytest.fixture(params=STREAMS)
def streams(request: pytest.FixtureRequest) -> dict[str, Any]:
    return STREAMS[request.param]


def assert_same(made: ClipSample, source: ClipSample) -> None:
    assert (made.key, made.identity, made.meta) == (source.key, source.identity, source.meta)
    assert made.tensors().keys() == source.tensors().keys()
    for name, value in source.tensors().items():
        assert made.tensors()[name].dtype == value.dtype and torch.equal(made.tensors()[name], value), name


def assert_statistics_are_those_of_the_clips(root: Path) -> None:
    moments = StreamMoments()
    for clip in read_clips(root)["train"]:
        moments.add(clip)
    assert ShardSet.open(root).manifest["statistics"] == moments.statistics("")


def members(root: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(root.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    return found


def make_merge(work: Path, out: Path) -> None:
    merge(out, [work / "one", work / "two"])


def make_split(work: Path, out: Path) -> None:
    split(work / "one", out, validation=0.5)


def make_drop(work: Path, out: Path) -> None:
    drop(work / "one", out, identities=["bob"])


MAKERS = {"merge": make_merge, "split": make_split, "drop": make_drop}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Two sets, "one" and "two", of different people."""
    rejected = [{"source": "x.mp4", "reason": "R_CUT", "detail": "jump"}]
    write_people(tmp_path / "one", rejected=rejected, info={"size": 32})
    write_people(tmp_path / "two", train=("dan",), validation=("eva",), clips=3)
    return tmp_path


@pytest.mark.parametrize("maker", MAKERS)
def test_same_call_same_bytes_and_the_sources_stay(work: Path, maker: str) -> None:
    before = {name: file_bytes(work / name) for name in ("one", "two")}
    for out in ("first", "deep/er/second"):
        MAKERS[maker](work, work / out)
    assert file_bytes(work / "first") == file_bytes(work / "deep/er/second")
    assert before == {name: file_bytes(work / name) for name in ("one", "two")}
    ShardSet.open(work / "first").verify()
    assert_statistics_are_those_of_the_clips(work / "first")


@pytest.mark.parametrize("maker", MAKERS)
def test_plain_tar_and_webdataset_read(work: Path, maker: str) -> None:
    out = work / "out"
    MAKERS[maker](work, out)
    opened = ShardSet.open(out)
    for name in ("train", "validation"):
        tars = [out / shard for shard in opened.manifest["splits"][name]["shards"]]
        listed = [line for tar in tars for line in subprocess.check_output(["tar", "-tf", tar], text=True).split()]
        keys = opened.split(name).keys
        assert listed == [f"{key}.{kind}" for key in keys for kind in ("json", "safetensors")]
        samples = [sample for tar in tars for sample in webdataset.WebDataset(str(tar), shardshuffle=False)]
        assert [sample["__key__"] for sample in samples] == keys
        assert [json.loads(sample["json"])["key"] for sample in samples] == keys


@pytest.mark.parametrize("maker", MAKERS)
def test_folder_that_exists_or_lies_inside_is_refused(work: Path, maker: str) -> None:
    (work / "file").write_text("x")
    (work / "empty").mkdir()
    (work / "link").symlink_to(work / "nowhere")
    (work / "alias").symlink_to(work / "one")
    before = sorted(work.rglob("*"))
    for out in ("file", "empty", "link", "one"):
        with pytest.raises(ShardError, match="exists: expected a new folder"):
            MAKERS[maker](work, work / out)
    for out in ("one/new", "alias/new/deep", "two/../one/new"):
        with pytest.raises(ShardError, match="inside the shard set"):
            MAKERS[maker](work, work / out)
    assert sorted(work.rglob("*")) == before


@pytest.mark.parametrize("maker", MAKERS)
def test_a_folder_that_comes_up_meanwhile_stays_as_it_is(
    work: Path, maker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another command that was given the same OUT: the clips of the two must not end in one folder."""
    out, original = work / "out", ShardSet.open

    def late(root: Path) -> ShardSet:
        out.mkdir(exist_ok=True)
        (out / "train-000000.tar.partial").write_bytes(b"theirs")
        return original(root)

    monkeypatch.setattr(ShardSet, "open", late)
    with pytest.raises(ShardError, match="out: exists: expected a new folder"):
        MAKERS[maker](work, out)
    assert file_bytes(out) == {"train-000000.tar.partial": b"theirs"}


@pytest.mark.parametrize("maker", MAKERS)
def test_damage_that_is_met_leaves_no_folder(work: Path, maker: str) -> None:
    tar = work / "one/validation-000000.tar"  # read after clips were written
    data = bytearray(tar.read_bytes())
    data[data.index(b"licence")] ^= 1
    tar.write_bytes(data)
    with pytest.raises(ShardError, match="damaged data"):
        MAKERS[maker](work, work / "out")
    assert not (work / "out").exists()


@pytest.mark.parametrize("maker", MAKERS)
def test_identity_that_the_manifest_hides_is_refused(work: Path, maker: str) -> None:
    path = work / "one/manifest.json"
    manifest = json.loads(path.read_text())
    names = manifest["splits"]["train"]["identities"]
    manifest["splits"]["train"]["identities"] = ["abe" if name == "ann" else name for name in names]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match=r"sample 'ann-w0': identity: 'ann': expected 'abe', as in the index"):
        MAKERS[maker](work, work / "out")


def test_each_clip_is_reported(work: Path) -> None:
    seen: list[tuple[int, int]] = []

    def bar(done: int, total: int) -> None:
        seen.append((done, total))

    merge(work / "m", [work / "one", work / "two"], advance=bar)
    split(work / "one", work / "s", validation=0.5, advance=bar)
    drop(work / "one", work / "d", keys=["ann-w0"], advance=bar)
    assert seen == [(done, total) for total in (12, 6, 6) for done in range(1, total + 1)]


def test_check_out_allows_a_sibling(work: Path) -> None:
    check_out(work / "one", work / "one-more")
    check_out(work / "one", work / "one/../new")


# merge


def test_merged_set_reads_equal_to_its_sources(tmp_path: Path, streams: dict[str, Any]) -> None:
    roots = [
        write_people(tmp_path / "a", **streams),
        write_people(tmp_path / "b", train=("dan",), validation=("eva",), clips=3, shard_bytes=1, **streams),
        write_people(tmp_path / "c", train=("fay",), validation=(), **streams),
    ]
    manifest = merge(tmp_path / "out", roots)
    made, sources = read_clips(tmp_path / "out"), [read_clips(root) for root in roots]
    for name in ("train", "validation"):
        expected = [clip for source in sources for clip in source[name]]
        assert len(expected) == len(made[name]) > 0
        for clip, source in zip(made[name], expected, strict=True):
            assert_same(clip, source)
    assert manifest["splits"]["train"]["identities"] == ["ann", "bob", "dan", "fay"]
    assert manifest["extractors"] == ShardSet.open(roots[0]).manifest["extractors"]


def test_merge_joins_what_was_rejected_and_names_its_sources_by_hash(work: Path) -> None:
    write_people(work / "three", train=("gil",), rejected=[{"source": "y.mp4", "reason": "R_SHORT", "detail": "3"}])
    drop(work / "three", work / "four", identities=["cyd"])
    manifest = merge(work / "out", [work / "one", work / "four"])
    assert [entry["source"] for entry in manifest["rejected"]] == ["x.mp4", "y.mp4"]
    digests = [hashlib.sha256((work / name / "manifest.json").read_bytes()).hexdigest() for name in ("one", "four")]
    assert manifest["info"] == {
        "merged": [
            {"manifest_sha256": digests[0], "info": {"size": 32}},
            {"manifest_sha256": digests[1], "info": {"dropped_clips": 2}},
        ],
        "prefixed": False,
    }
    assert str(work).encode() not in b"".join(file_bytes(work / "out").values())


def test_key_in_two_sets_needs_a_prefix(tmp_path: Path) -> None:
    roots = [
        write_people(tmp_path / name, clips=count, sources=dict.fromkeys(("ann", "bob", "cyd"), name))
        for name, count in (("a", 1), ("b", 2))
    ]
    with pytest.raises(
        ShardError, match=r"sample 'ann-w0': key: .*expected one that .*/a does not use \(or --prefix\)"
    ):
        merge(tmp_path / "out", roots)
    merge(tmp_path / "out", roots, prefix=True)
    keys = ShardSet.open(tmp_path / "out").split("train").keys
    assert keys == ["1-ann-w0", "1-bob-w0", "2-ann-w0", "2-ann-w1", "2-bob-w0", "2-bob-w1"]
    made, source = read_clips(tmp_path / "out")["train"][3], read_clips(tmp_path / "b")["train"][1]
    assert made.identity == "ann" and torch.equal(made.video, source.video) and made.meta == source.meta


def test_more_clips_than_a_set_may_have_are_refused_before_any_is_read(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_shards.edit.MAX_CLIPS", 11)
    with pytest.raises(ShardError, match="12 clips in 2 sets: expected at most 11 in one"):
        merge(work / "out", [work / "one", work / "two"], advance=lambda done, total: pytest.fail("read"))
    assert not (work / "out").exists()


def test_a_prefix_does_not_hide_a_clip_that_is_in_two_sets(work: Path) -> None:
    """A set and one made from it have other manifests, and the same clips."""
    drop(work / "one", work / "less", keys=["ann-w0"])
    with pytest.raises(ShardError, match=r"less: sample '.*-w\d': clip: .*: expected one that is not in .*one"):
        merge(work / "out", [work / "one", work / "two", work / "less"], prefix=True)
    assert not (work / "out").exists()


def test_key_that_a_prefix_makes_too_long(tmp_path: Path) -> None:
    roots = [write_people(tmp_path / name, train=(name * 76,)) for name in ("a", "b")]
    with pytest.raises(ShardError, match=r"/a: sample '1-a+-w0': key: .*expected 1 to 80 characters"):
        merge(tmp_path / "out", roots, prefix=True)
    assert not (tmp_path / "out").exists()


def different_motion(root: Path) -> None:
    write_people(root, train=("dan",), motion_tag="other-motion-v2")


def different_width(root: Path) -> None:
    write_people(root, train=("dan",), height=6, width=6)


def different_streams(root: Path) -> None:
    write_people(root, train=("dan",), flame=True)


def different_frames(root: Path) -> None:
    write_people(root, train=("dan",), frames=4)


def other_side(root: Path) -> None:
    write_people(root, train=("dan", "cyd"), validation=("eva",))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (different_motion, r"b: extractors.motion.tag: 'other-motion-v2': expected 'random-motion-v1', as in .*a$"),
        (different_width, r"b: extractors.video.height: 6: expected 4, as in .*a$"),
        (different_streams, r"b: extractors.flame.tag: 'random-flame-v1': expected None, as in .*a$"),
        (different_frames, r"b: frames: 4: expected 3, as in .*a$"),
        (other_side, r"b: identity 'cyd' is in train, but in validation of .*a: expected one split"),
    ],
)
def test_sets_that_do_not_go_together(tmp_path: Path, make: Callable[[Path], None], named: str) -> None:
    write_people(tmp_path / "a")
    make(tmp_path / "b")
    with pytest.raises(ShardError, match=named):
        merge(tmp_path / "out", [tmp_path / "a", tmp_path / "b"], prefix=True)
    assert not (tmp_path / "out").exists()


def test_sets_with_texts_of_other_lengths_are_refused_before_any_clip_is_read(tmp_path: Path) -> None:
    write_people(tmp_path / "a", text_dim=5)
    extractors = fake_extractors(text_dim=5)
    with ShardSetWriter(tmp_path / "b", extractors) as writer:
        writer.add("train", fake_sample("dan", "dan", extractors, frames=3, text_tokens=4))
        writer.finish([], {})
    with pytest.raises(ShardError, match=r"b: text tokens: 4: expected 3, as in .*a$"):
        merge(tmp_path / "out", [tmp_path / "a", tmp_path / "b"], advance=lambda done, total: pytest.fail("read"))
    assert not (tmp_path / "out").exists()


def test_a_set_is_not_merged_with_itself_or_alone(work: Path) -> None:
    with pytest.raises(ShardError, match=r"one: the same set as .*one: expected another"):
        merge(work / "out", [work / "two", work / "one", work / "one"], prefix=True)
    with pytest.raises(ShardError, match="1 shard sets to merge: expected at least 2"):
        merge(work / "out", [work / "one"])


# split


PEOPLE = [f"person{number}" for number in range(20)]


def test_split_deals_identities_and_keeps_the_clips(tmp_path: Path, streams: dict[str, Any]) -> None:
    root = write_people(tmp_path / "a", train=PEOPLE[:17], validation=PEOPLE[17:], shard_bytes=4000, **streams)
    split(root, tmp_path / "out", validation=0.3, seed=1)
    before, after = read_clips(root), read_clips(tmp_path / "out")
    sides = {name: {clip.identity for clip in clips} for name, clips in after.items()}
    assert not sides["train"] & sides["validation"] and sides["train"] | sides["validation"] == set(PEOPLE)
    assert all(side_of(identity, 0.3, 1) == name for name, people in sides.items() for identity in people)
    source = {clip.key: clip for clips in before.values() for clip in clips}
    made = {clip.key: clip for clips in after.values() for clip in clips}
    assert made.keys() == source.keys()
    for key, clip in made.items():
        assert_same(clip, source[key])
    assert members(tmp_path / "out") == members(root)


def test_side_is_a_function_of_identity_and_seed_alone() -> None:
    # Fixed values: changing the rule would move people between the splits of existing sets.
    assert [side_of(name, 0.5, 0) for name in ("ann", "bob", "cyd", "dan")] == [
        "validation",
        "train",
        "train",
        "validation",
    ]
    names = [str(number) for number in range(4000)]
    held_out = {seed: {name for name in names if side_of(name, 0.05, seed) == "validation"} for seed in (0, 1)}
    assert all(150 < len(held) < 250 for held in held_out.values())
    assert len(held_out[0] & held_out[1]) < 30
    assert held_out[0] < {name for name in names if side_of(name, 0.1, 0) == "validation"}  # a larger share only adds


def test_split_does_not_depend_on_the_earlier_split(tmp_path: Path) -> None:
    write_people(tmp_path / "a", train=PEOPLE[:9], validation=PEOPLE[9:])
    write_people(tmp_path / "b", train=PEOPLE[5:], validation=PEOPLE[:5])
    made = [split(tmp_path / name, tmp_path / f"{name}-out", validation=0.4) for name in ("a", "b")]
    people = [[manifest["splits"][name]["identities"] for name in ("train", "validation")] for manifest in made]
    assert people[0] == people[1]
    split(tmp_path / "a-out", tmp_path / "again", validation=0.4)
    assert file_bytes(tmp_path / "again") == file_bytes(tmp_path / "a-out")
    assert made[0]["info"] == {"split": {"seed": 0, "validation": 0.4}}


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
def test_side_without_an_identity_is_an_error(work: Path, share: float) -> None:
    side = "validation" if share < 0.5 else "train"
    with pytest.raises(ShardError, match=f"none of 3 identities falls to {side} with a validation share of .* seed 7"):
        split(work / "one", work / "out", validation=share, seed=7)
    assert not (work / "out").exists()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_share_that_is_none(work: Path, share: float) -> None:
    with pytest.raises(ShardError, match="expected more than 0 and less than 1"):
        split(work / "one", work / "out", validation=share)


# drop


def mention(source: str, detail: str = "3 frames") -> dict[str, Any]:
    return {"source": source, "reason": "R_SHORT", "detail": detail}


def test_drop_leaves_no_trace(tmp_path: Path, streams: dict[str, Any]) -> None:
    rejected = [
        mention("x.mp4"),
        mention("bob.mp4"),
        mention("copies/BOB_2.mov"),
        mention("y.mp4", "the same bytes as bob.mp4"),
        mention("bobby.mp4"),
        {**mention("z.mp4"), "faces": {"bob": 0.9}},
    ]
    info = {"size": 32, "by": ["bob", "ann"], "bob": 1, "note": {"asked by": "Bob", "limit": 2}}
    root = write_people(tmp_path / "a", rejected=rejected, info=info, shard_bytes=4000, **streams)
    done = drop(root, tmp_path / "out", identities=["bob"])
    assert (done.clips, done.kept, done.rejected, done.mentions) == (2, 4, 4, ())
    manifest = ShardSet.open(tmp_path / "out").manifest
    assert manifest["rejected"] == [rejected[0], rejected[4]]
    assert manifest["info"] == {"size": 32, "by": ["ann"], "note": {"limit": 2}, "dropped_clips": 2}
    everything = b"".join(file_bytes(tmp_path / "out").values()).replace(b"bobby.mp4", b"")
    assert b"bob" not in everything.lower()
    assert not list((tmp_path / "out").glob("*bob*"))
    kept = {name: data for name, data in members(root).items() if not name.startswith("bob")}
    assert members(tmp_path / "out") == kept and len(kept) == 8
    assert_statistics_are_those_of_the_clips(tmp_path / "out")


def test_source_that_is_not_called_as_the_person_goes_too(tmp_path: Path) -> None:
    rejected = [
        mention("interviews/0815 final.mp4"),
        mention("z.mp4", "as interviews/0815 final.mp4"),
        mention("x.mp4"),
        mention("bob later.mp4"),
    ]
    root = write_people(tmp_path / "a", rejected=rejected, sources={"bob": "interviews/0815 final.mp4"})
    assert drop(root, tmp_path / "out", identities=["bob"]).rejected == 3
    assert b"interviews" not in b"".join(file_bytes(tmp_path / "out").values())
    # One clip of two: the source and the person are still there, and so is what is told of them.
    assert drop(root, tmp_path / "one-clip", keys=["bob-w0"]).rejected == 0
    assert b"bob-w0" not in b"".join(file_bytes(tmp_path / "one-clip").values())
    # Both clips by key: as if the person had been named.
    assert drop(root, tmp_path / "by-key", keys=["bob-w0", "bob-w1"]).rejected == 3
    assert file_bytes(tmp_path / "by-key") == file_bytes(tmp_path / "out")


def test_drop_counts_the_licences_anew(tmp_path: Path) -> None:
    """A build's count of its clips would be that of the set before."""
    root = write_people(tmp_path / "a", info={"licences": {"CC0-1.0": 6, "cc-by": 9}})
    drop(root, tmp_path / "out", keys=["bob-w0"])
    assert ShardSet.open(tmp_path / "out").manifest["info"] == {"licences": {"CC0-1.0": 5}, "dropped_clips": 1}


def test_names_are_matched_as_a_whole_and_kept_sources_stay(tmp_path: Path) -> None:
    rejected = [
        mention("id10.mp4"),
        mention("paid1.mp4"),
        mention("id1-b.mp4"),
        mention("id1.mp4"),
        mention("id1_b.mp4"),
    ]
    root = write_people(tmp_path / "a", train=("id1", "id10", "id1-b"), rejected=rejected)
    done = drop(root, tmp_path / "out", identities=["id1"])
    sources = [entry["source"] for entry in ShardSet.open(tmp_path / "out").manifest["rejected"]]
    assert sources == ["id10.mp4", "paid1.mp4", "id1-b.mp4"] and done.rejected == 2
    assert done.mentions == ("id1-b-w0", "id1-b-w1")  # another person, as far as anyone knows: said, not dropped


def test_drops_add_up(work: Path) -> None:
    drop(work / "one", work / "first", keys=["ann-w0"])
    drop(work / "first", work / "second", identities=["bob"], keys=["bob-w0"])
    assert ShardSet.open(work / "second").manifest["info"] == {"size": 32, "dropped_clips": 3}
    assert ShardSet.open(work / "second").split("train").keys == ["ann-w1"]


def test_held_out_people_can_be_dropped(work: Path) -> None:
    drop(work / "one", work / "out", identities=["cyd"])
    assert ShardSet.open(work / "out").manifest["splits"]["validation"]["identities"] == []
    assert members(work / "out").keys() == {
        f"{who}-w{n}.{kind}" for who in ("ann", "bob") for n in (0, 1) for kind in ("json", "safetensors")
    }


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ({"identities": ["ann", "bo"]}, r"identity 'bo': expected one of the set's 3 \(nearest: 'bob'\)$"),
        ({"keys": ["ann-w2"]}, r"key 'ann-w2': expected one of the set's 6 \(nearest: 'ann-w1', 'ann-w0'\)$"),
        ({"identities": ["0815"]}, r"identity '0815': expected one of the set's 3$"),
        ({}, "nothing to drop: expected at least one identity or key"),
        ({"identities": ["ann", "bob"]}, "one: none of 4 train clips would be left: expected at least 1 to train on"),
        ({"keys": ["bob-w1", "bob-w0"], "identities": ["ann", "cyd"]}, "one: none of 4 train clips would be left"),
    ],
)
def test_drop_that_cannot_be(work: Path, monkeypatch: pytest.MonkeyPatch, what: dict[str, Any], named: str) -> None:
    """Said before a clip is read, or a folder made: sets may be large."""
    monkeypatch.setattr(ShardReader, "read", lambda *_: pytest.fail("a clip was read"))
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("a folder was made"))
    with pytest.raises(ShardError, match=named):
        drop(work / "one", work / "out", **what)
    assert not (work / "out").exists()
