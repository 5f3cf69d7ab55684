"""What the writer refuses, and what it leaves behind when it is stopped."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_shards import fake_extractors, fake_sample, write_fake_shards

import data_shards.writer
from data_shards.reader import ShardSet
from data_shards.schema import ShardError, check_extractors, validate
from data_shards.writer import ShardSetWriter

EXTRACTORS = fake_extractors(flame=True, text_dim=5)


def clip(key: str = "a", identity: str = "id", **changes: Any) -> Any:
    return replace(fake_sample(key, identity, EXTRACTORS, frames=3), **changes)


@pytest.mark.parametrize("key", ["", "a/b", "a.b", "../a", "ä", "a b", "k" * 81, "a\n"])
def test_keys_that_cannot_name_a_member(key: str) -> None:
    with pytest.raises(ShardError, match=r"key: .*: expected 1 to 80 characters"):
        validate(clip(key), "clip.mp4", EXTRACTORS)


@pytest.mark.parametrize("key", ["_a", "-a-", "A9", "k" * 80])
def test_keys_that_can(key: str) -> None:
    validate(clip(key), "clip.mp4", EXTRACTORS)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"identity": ""}, "identity: ''"),
        ({"flame": None}, "flame: absent"),
        ({"flame_valid": None}, "flame_valid: absent"),
        ({"text": None}, "text: absent"),
        ({"text": torch.zeros(0, 5)}, "text: shape [0, 5]"),
        ({"text": torch.zeros(2, 4)}, "text: shape [2, 4]: expected [2, 5]"),
        ({"video": torch.zeros(16, 4, 4)}, "video: shape [16, 4, 4]"),
        ({"reference": torch.zeros(16, 4, 4)}, "reference: dtype float32: expected float16"),
        ({"flame_valid": torch.ones(3, 4)}, "flame_valid: dtype float32: expected bool"),
        ({"struct": torch.arange(96.0).view(3, 4, 8)}, "struct: slots 0 to 3 of frame 0 differ"),
    ],
)
def test_samples_outside_the_contract(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ShardError) as caught:
        validate(clip(**changes), "clip.mp4", EXTRACTORS)
    assert str(caught.value).startswith("clip.mp4: sample 'a': ")
    assert named in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", ["video", "reference", "struct", "audio", "flame", "text"])
def test_one_bad_value_anywhere_is_found(field: str, value: float) -> None:
    sample = clip()
    sample.tensors()[field].view(-1)[-1] = value
    with pytest.raises(ShardError, match=f"{field}: 1 values that are not finite, the first at"):
        validate(sample, "clip.mp4", EXTRACTORS)


def test_unlisted_stream_is_refused() -> None:
    with pytest.raises(ShardError, match="flame: present: expected no such tensor"):
        validate(clip(), "clip.mp4", fake_extractors())


@pytest.mark.parametrize(
    ("stream", "entry", "named"),
    [
        ("video", {"tag": "t", "channels": 16, "height": 4}, "extractors.video.width: None"),
        ("motion", {"tag": "", "width": 3}, "extractors.motion.tag"),
        ("motion", {"tag": "t", "width": 3, "names": ["a"]}, "extractors.motion.names: '1 names': expected 3"),
        ("audio", {"tag": "t", "width": True}, "extractors.audio.width: True"),
        ("audio", {"tag": "t", "width": 8, "hz": 100}, "extractors.audio.hz: 100: expected 50"),
        ("depth", {"tag": "t"}, "extractors.depth"),
    ],
)
def test_extractor_tables(stream: str, entry: dict[str, Any], named: str) -> None:
    with pytest.raises(ShardError) as caught:
        check_extractors({**fake_extractors(), stream: entry}, "manifest.json")
    assert named in str(caught.value)


def test_key_twice_and_identity_in_two_splits(tmp_path: Path) -> None:
    with ShardSetWriter(tmp_path, EXTRACTORS) as writer:
        writer.add("train", clip("a", "one"))
        with pytest.raises(ShardError, match="key: a: expected a key that no other clip"):
            writer.add("validation", clip("a", "two"))
        with pytest.raises(ShardError, match="split: validation: expected train, where identity 'one' is"):
            writer.add("validation", clip("b", "one"))
        with pytest.raises(ShardError, match="split: test"):
            writer.add("test", clip("b", "one"))


def test_one_length_per_set(tmp_path: Path) -> None:
    with ShardSetWriter(tmp_path, EXTRACTORS) as writer:
        writer.add("train", clip("a"))
        with pytest.raises(ShardError, match="video: length 4: expected 3"):
            writer.add("train", fake_sample("b", "id", EXTRACTORS, frames=4))
        with pytest.raises(ShardError, match="text: length 2: expected 3"):
            writer.add("train", fake_sample("b", "id", EXTRACTORS, frames=3, text_tokens=2))


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [float("nan"), {1, 2}, b"x", nested(10**5), "x" * 2**22, [0] * 800_000],
    ids=["nan", "set", "bytes", "deep", "long", "many"],
)
def test_what_no_reader_would_accept_is_not_written(tmp_path: Path, value: Any) -> None:
    with ShardSetWriter(tmp_path, EXTRACTORS) as writer:
        with pytest.raises(ShardError, match=r"sample 'a': (meta|json): .* expected") as caught:
            writer.add("train", clip(meta={"x": value}))
        assert "\n" not in str(caught.value)
        writer.add("train", clip())
        writer.finish([], {})
    assert ShardSet.open(tmp_path).split("train").read(0).key == "a"


def test_a_clip_larger_than_readers_accept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_shards.writer, "MAX_CLIP_BYTES", 5000)
    refusal = pytest.raises(ShardError, match=r"sample 'a': safetensors: \d+ bytes: expected at most 5000")
    with ShardSetWriter(tmp_path, EXTRACTORS) as writer, refusal:
        writer.add("train", clip())


@pytest.mark.parametrize(("name", "value"), [("MAX_CLIPS", 3), ("MAX_INDEX_BYTES", 1100), ("MAX_TARS", 3)])
def test_a_set_that_no_reader_would_open_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    monkeypatch.setattr(data_shards.writer, name, value)
    with ShardSetWriter(tmp_path, EXTRACTORS, shard_bytes=1) as writer:
        for key in "abc":
            writer.add("train", clip(key))
        with pytest.raises(ShardError, match=r"sample 'd': index: 4 clips in 4 tars, \d+ bytes: expected at most"):
            writer.add("train", clip("d"))
        writer.finish([], {})
    assert ShardSet.open(tmp_path).split("train").keys == list("abc")


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, b"x"], ids=["nan", "set", "bytes"])
def test_meta_must_be_json(tmp_path: Path, value: Any) -> None:
    with ShardSetWriter(tmp_path, EXTRACTORS) as writer:
        with pytest.raises(ShardError, match=r"sample 'a': meta: .* expected plain JSON"):
            writer.add("train", clip(meta={"x": value}))
        writer.add("train", clip())  # the refused clip left nothing behind
        writer.finish([], {})
    assert ShardSet.open(tmp_path).split("train").keys == ["a"]


def test_empty_train_split(tmp_path: Path) -> None:
    with ShardSetWriter(tmp_path, EXTRACTORS) as writer:
        writer.add("validation", clip())
        with pytest.raises(ShardError, match="train: 0 samples"):
            writer.finish([], {})
    assert list(tmp_path.iterdir()) == []


def test_existing_set_is_not_touched(tmp_path: Path) -> None:
    root = write_fake_shards(tmp_path, clips=2)
    before = {path.name: path.read_bytes() for path in root.iterdir()}
    with pytest.raises(ShardError, match="a shard set exists here"):
        ShardSetWriter(root, EXTRACTORS)
    assert {path.name: path.read_bytes() for path in root.iterdir()} == before


def test_interrupted_build_leaves_no_set_and_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(KeyboardInterrupt), ShardSetWriter(tmp_path, EXTRACTORS, shard_bytes=1) as writer:
        writer.add("train", clip("a"))
        writer.add("train", clip("b"))
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    killed = ShardSetWriter(tmp_path, EXTRACTORS, shard_bytes=1)  # a killed process runs no clean-up
    for key in "abc":
        killed.add("train", clip(key))
    assert (tmp_path / "train-000001.tar").exists() and not (tmp_path / "manifest.json").exists()
    with pytest.raises(ShardError, match=r"manifest\.json"):
        ShardSet.open(tmp_path)
    with ShardSetWriter(tmp_path, EXTRACTORS) as writer:
        writer.add("train", clip("a"))
        writer.finish([], {})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "index.safetensors", "manifest.json", "notes.txt", "train-000000.sums.safetensors", "train-000000.tar"
    ]  # fmt: skip


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a traceback of a tar that tries to write its end while it is thrown away."""

    def on_full_disk(path: Path, mode: str) -> Any:
        path.touch()
        return open("/dev/full", mode)

    monkeypatch.setattr(data_shards.shard, "open", on_full_disk, raising=False)
    with pytest.raises(OSError, match="No space left on device"), ShardSetWriter(tmp_path, EXTRACTORS) as writer:
        for number in range(100):
            writer.add("train", clip(f"t{number}", "one"))
            writer.add("validation", clip(f"v{number}", "other"))
    del writer
    gc.collect()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", ["voiced", "flame_valid"])
def test_a_byte_that_is_no_bool(field: str) -> None:
    sample = clip()
    sample.tensors()[field].view(torch.uint8).view(-1)[-1] = 2
    with pytest.raises(ShardError, match=f"sample 'a': {field}: byte 2: expected 0 or 1, as bool"):
        validate(sample, "clip.mp4", EXTRACTORS)


def test_checksums_are_held_until_they_are_beside_the_tar(tmp_path: Path) -> None:
    """Those of all clips of a large set together would be a gigabyte."""
    with ShardSetWriter(tmp_path, EXTRACTORS, shard_bytes=1) as writer:
        for number in range(4):
            writer.add("train", clip(f"k{number}"))
        rows = [len(made.row) for shard in writer._shards["train"] for made in shard.clips]
        assert rows[:3] == [0, 0, 0] and rows[3] > 0
        writer.finish([], {})
    assert len(ShardSet.open(tmp_path).split("train")) == 4
