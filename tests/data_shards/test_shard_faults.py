"""Every kind of damage is one line that names the shard, the sample and what was expected."""

from __future__ import annotations

import json
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_shards import fake_extractors, fake_sample, write_fake_shards
from helpers.shard_edits import change_index, change_rows, locate, replace_member, rewrite, seal
from safetensors.torch import save

from data_shards.reader import ShardSet
from data_shards.schema import ShardError
from data_shards.writer import ShardSetWriter

TAR, SUMS, INDEX, MANIFEST = "train-000000.tar", "train-000000.sums.safetensors", "index.safetensors", "manifest.json"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_shards(tmp_path_factory.mktemp("pristine"), clips=3, frames=3)


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "shards"))


def read_all(root: Path) -> None:
    opened = ShardSet.open(root)
    for split in ("train", "validation"):
        reader = opened.split(split)
        for index in range(len(reader)):
            reader.read(index)


def fault(root: Path) -> str:
    with pytest.raises(ShardError) as caught:
        read_all(root)
    message = str(caught.value)
    assert "\n" not in message
    assert "expected" in message
    return message


def test_a_whole_set_has_no_fault(root: Path) -> None:
    read_all(root)
    ShardSet.open(root).verify()


def test_flipped_bits_in_members_are_always_named(root: Path) -> None:
    data = (root / TAR).read_bytes()
    dice = random.Random(0)
    members = [(i, m) for i, clip in enumerate(locate(root)) for m in (clip.record, clip.payload)]
    for _ in range(100):
        number, member = dice.choice(members)
        broken = bytearray(data)
        broken[member.offset + dice.randrange(member.size)] ^= 1 << dice.randrange(8)
        (root / TAR).write_bytes(broken)
        with pytest.raises(ShardError, match="damaged data") as caught:
            ShardSet.open(root).split("train").read(number)
        assert f"{TAR}: sample 'train-000{number}': " in str(caught.value)


def test_flips_outside_members_are_found_too(root: Path) -> None:
    data = (root / TAR).read_bytes()
    members = [member for clip in locate(root) for member in (clip.record, clip.payload)]
    behind = [m.offset + m.size for m in members if m.size % 512]
    for position in (*(m.offset - 512 for m in members), *(m.offset - 1 for m in members), *behind):
        broken = bytearray(data)
        broken[position] ^= 1
        (root / TAR).write_bytes(broken)
        assert TAR in fault(root), position
    (root / TAR).write_bytes(data[:-1] + b"\1")  # behind the last member, where no clip is
    with pytest.raises(ShardError, match=f"{TAR}: sha256"):
        ShardSet.open(root).verify()
    seal(root, TAR)  # a hostile author, who lets other readers see more than this one
    with pytest.raises(ShardError, match=f"{TAR}: bytes behind the last member: expected zeros from"):
        ShardSet.open(root).verify()


def test_an_index_that_changes_after_opening_is_found_by_verify(root: Path) -> None:
    opened = ShardSet.open(root)
    (root / INDEX).write_bytes((root / INDEX).read_bytes()[:-1] + b"x")
    with pytest.raises(ShardError, match=f"{INDEX}: sha256"):
        opened.verify()


def test_every_truncation_is_found_on_opening(root: Path) -> None:
    data = (root / TAR).read_bytes()
    dice = random.Random(1)
    for size in [0, 1, 511, 512, len(data) - 1, *(dice.randrange(len(data)) for _ in range(60))]:
        (root / TAR).write_bytes(data[:size])
        with pytest.raises(ShardError, match="truncated") as caught:
            ShardSet.open(root)
        assert TAR in str(caught.value) and str(len(data)) in str(caught.value)


def test_truncation_after_opening_names_the_sample(root: Path) -> None:
    reader = ShardSet.open(root).split("train")
    (root / TAR).write_bytes((root / TAR).read_bytes()[:2000])
    with pytest.raises(ShardError, match=r"train-000000.tar: sample 'train-0002': .*truncated"):
        reader.read(2)


@pytest.mark.parametrize("name", [TAR, SUMS, INDEX, MANIFEST])
def test_missing_file_is_named(root: Path, name: str) -> None:
    (root / name).unlink()
    assert name in fault(root)


def test_missing_tensor(root: Path) -> None:
    clip = ShardSet.open(root).split("train").read(1)
    replace_member(root, TAR, "train-0001.safetensors", save({k: v for k, v in clip.tensors().items() if k != "audio"}))
    assert f"{MANIFEST}: layouts[1]: audio: absent" in fault(root)


@pytest.mark.parametrize(
    ("field", "change", "named"),
    [
        ("video", lambda x: x.index_fill(0, torch.tensor([1]), float("nan")), "video: 256 values that are not finite"),
        ("video", lambda x: x[:, :, :3].contiguous(), "expected [3, 16, 4, 4]"),
        ("video", lambda x: x.double(), "dtype float64: expected float16 or bfloat16 or float32"),
        ("struct", lambda x: x[:2].contiguous(), "struct: shape [2, 4, 8]: expected [3, 4, 8]"),
        ("struct", lambda x: x.half(), "dtype float16: expected float32"),
        ("audio", lambda x: torch.full_like(x, float("inf")), "audio: 288 values that are not finite"),
        ("audio", lambda x: x.roll(1, dims=1), "audio: slots 0 to 6 of frame 0 differ"),
        ("voiced", lambda x: x.to(torch.uint8), "dtype uint8: expected bool"),
    ],
)
def test_wrong_tensor_is_named(
    root: Path, field: str, change: Callable[[torch.Tensor], torch.Tensor], named: str
) -> None:
    tensors = ShardSet.open(root).split("train").read(0).tensors()
    replace_member(root, TAR, "train-0000.safetensors", save({**tensors, field: change(tensors[field])}))
    message = fault(root)
    assert f"{TAR}: sample 'train-0000': {field}: " in message or f"{MANIFEST}: layouts[1]: {field}: " in message
    assert named in message


def test_foreign_bytes_are_not_executed_but_named(root: Path) -> None:
    size = len(save(ShardSet.open(root).split("train").read(0).tensors()))
    replace_member(root, TAR, "train-0000.safetensors", b"\x80\x04\x95 not safetensors".ljust(size))
    assert "sample 'train-0000': train-0000.safetensors: " in fault(root)
    replace_member(root, TAR, "train-0000.safetensors", save(ShardSet.open(root).split("train").read(1).tensors()))
    replace_member(root, TAR, "train-0000.json", b"[" * 100_000)
    assert "sample 'train-0000': train-0000.json: " in fault(root)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shard_version", 2),
        ("shard_version", True),
        ("identity", "else"),
        ("frames", 4),
        ("extractors", {}),
        ("meta", 0),
    ],
)
def test_record_that_disagrees(root: Path, key: str, value: Any) -> None:
    with tarfile.open(root / TAR) as tar:
        record = json.load(tar.extractfile("train-0002.json"))  # type: ignore[arg-type]
    record[key] = value
    replace_member(root, TAR, "train-0002.json", json.dumps(record).encode())
    message = fault(root)
    assert f"{TAR}: sample 'train-0002'" in message and key in message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.update(shard_version=4), "shard_version: 4: expected 3"),
        (lambda m: m.update(shard_version=2), "shard_version: 2: expected 3 (make a set of this version with: "),
        (lambda m: m.pop("statistics"), "statistics: absent"),
        (lambda m: m.update(frames=0), "frames: 0"),
        (lambda m: m["extractors"].pop("audio"), "extractors.audio"),
        (lambda m: m["extractors"]["motion"].update(width=-1), "extractors.motion.width: -1"),
        (lambda m: m["extractors"]["audio"].update(tag="other-v1"), "the manifest's tags"),
        (lambda m: m["extractors"]["video"].update(tag="unknown-v9"), "unknown-v9"),
        (
            lambda m: m["splits"]["train"].update(samples=4),
            "another header: expected that of 6 samples in 2 shards",
        ),
        (lambda m: m["splits"]["train"].update(shards=["../evil.tar"]), "'../evil.tar'"),
        (lambda m: m["splits"].pop("validation"), "validation"),
        (
            lambda m: m["splits"]["train"]["identities"].pop(),
            "identity: number 1: expected one of the 1 ",
        ),
        (lambda m: m["splits"]["train"]["identities"].append("x"), "identities: 'x': expected one that has a clip"),
        (lambda m: m["splits"]["train"]["identities"].reverse(), "expected names in order"),
        (lambda m: m["splits"]["validation"].update(identities=["train-id00"]), "expected one that is not in train"),
        (lambda m: m.update(frames=5), "layouts[0]: video: 3 latent frames: expected 5"),
        (lambda m: m.pop("layouts"), "layouts: absent"),
        (lambda m: m.update(layouts=[]), "layouts: 0: expected 1 to 64"),
        (lambda m: m.update(layouts=m["layouts"] * 65), "layouts: 65: expected 1 to 64"),
        (lambda m: m["files"].pop(INDEX), f"files.{INDEX}: absent"),
        (lambda m: m["files"].pop(SUMS), f"files.{SUMS}: absent"),
        (lambda m: m["files"][TAR].update(bytes=7), f"files.{TAR}.bytes: 7: expected "),
        (lambda m: m["files"][SUMS].update(bytes=7), f"files.{SUMS}.bytes: 7: expected "),
    ],
)
def test_wrong_manifest(root: Path, change: Callable[[dict[str, Any]], None], named: str) -> None:
    rewrite(root / MANIFEST, change)
    assert named in fault(root)


def test_manifest_that_is_not_json(root: Path) -> None:
    (root / MANIFEST).write_text('{"shard_version": NaN')
    assert "manifest.json" in fault(root)
    (root / MANIFEST).write_text("[]")
    assert "expected a JSON object" in fault(root)


def test_changed_index_is_found(root: Path) -> None:
    data = bytearray((root / INDEX).read_bytes())
    data[-1] ^= 1
    (root / INDEX).write_bytes(data)
    assert f"{INDEX}: sha256" in fault(root)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda c: c.update(keys=c["keys"].replace(b"train-0001", b"train-0002")),
            "key: train-0002: expected a key that",
        ),
        (
            lambda c: c.update(keys=c["keys"].replace(b"train-0001", b"train/0001")),
            "key: 'train/0001': expected 1 to 80",
        ),
        (lambda c: c.update(keys=c["keys"].replace(b"train-0001", b"")), "key: '': expected 1 to 80"),
        (lambda c: c.update(keys=c["keys"].replace(b"train-0001", b"k" * 81)), "expected 1 to 80"),
        (lambda c: c.update(keys=c["keys"][:-1]), "keys: 4 lines: expected 5 whole lines"),
        (lambda c: c.update(keys=c["keys"] + b"x\n"), "keys: 6 lines: expected 5 whole lines"),
        (lambda c: c.update(keys=c["keys"] + b"x"), "keys: 5 lines: expected 5 whole lines"),
        (lambda c: c["identity"].__setitem__(0, 2), "identity: number 2: expected one of the 2"),
        (lambda c: c["identity"].__setitem__(2, 0), "identities: 'train-id01': expected one that has a clip"),
        (lambda c: c["layout"].__setitem__(4, 1), "layout[4]: 1: expected at most 0"),
        (lambda c: c["record_bytes"].__setitem__(1, 2**23), "record_bytes[1]: 8388608: expected at most 4194304"),
        (lambda c: c["record_bytes"].__setitem__(1, 2**14), f"{TAR}: "),
        (lambda c: c["clips"].__setitem__(slice(None), [2, 3]), "splits.train.samples: 3: expected 2"),
        (lambda c: c["clips"].__setitem__(slice(None), [5, 0]), "clips: 0 of validation-000000.tar"),
        (lambda c: c["sums"].__setitem__(1, 7), f"{SUMS}: sample 'train-0001': checksums: "),
    ],
)
def test_an_index_that_lies(root: Path, change: Callable[[dict[str, Any]], None], named: str) -> None:
    change_index(root, change)
    assert named in fault(root)


def test_an_index_or_checksums_of_another_size(root: Path) -> None:
    for name, by in ((INDEX, b"x"), (SUMS, b"x"), (TAR, b"x")):
        good = (root / name).read_bytes()
        (root / name).write_bytes(good + by)
        seal(root, name)
        assert name in fault(root) or f"{MANIFEST}: files.{name}" in fault(root)
        (root / name).write_bytes(good)
        seal(root, name)
    read_all(root)


def test_headers_of_index_and_checksums_are_those_of_their_columns(root: Path) -> None:
    for name in (INDEX, SUMS):
        good = (root / name).read_bytes()
        (root / name).write_bytes(good.replace(b"data_offsets", b"data_0ffsets", 1))
        seal(root, name)
        with pytest.raises(ShardError, match=rf"{name}: another header"):
            ShardSet.open(root).verify()
        (root / name).write_bytes(good)
        seal(root, name)


def test_checksums_are_checked_with_the_clip_that_they_are_of(root: Path) -> None:
    good = (root / SUMS).read_bytes()
    words = (len(good) - 1024) // 3
    for clip in range(3):
        data = bytearray(good)
        data[1024 + clip * words + 9] ^= 2
        (root / SUMS).write_bytes(data)
        reader = ShardSet.open(root).split("train")
        for other in range(3):
            if other != clip:
                reader.read(other, 1)
        with pytest.raises(ShardError, match=rf"{SUMS}: sample 'train-000{clip}': checksums: xxh3 .*damaged data"):
            reader.read(clip, 1)
        with pytest.raises(ShardError, match=f"{SUMS}: sha256"):
            ShardSet.open(root).verify()


def test_frames_with_other_checksums_are_refused(root: Path) -> None:
    change_rows(root, TAR, lambda rows: rows.__setitem__((1, 2), 7))
    reader = ShardSet.open(root).split("train")
    reader.read(1, 1)
    with pytest.raises(ShardError, match=r"video: xxh3 [0-9a-f]{16} of latent frame 1: expected 0000000000000007"):
        reader.read(1, 2)


def test_another_layout_of_the_set_does_not_fit_a_clip(root: Path) -> None:
    """The same sizes, another order of the tensors: the member itself must begin with the header."""
    text = json.loads((root / MANIFEST).read_bytes())["layouts"][0]
    other = text.replace('"__metadata__"', '"x"').replace(" ", "")
    other = '{"__metadata__":{}' + other[1:].join((",", "")) if '"__metadata__"' not in other else other
    assert len(other) > len(text.rstrip())
    size = len(text) + (len(other) - len(text) + 511) // 512 * 512  # of as many blocks more as the tar then lacks
    rewrite(root / MANIFEST, lambda m: m.update(layouts=[other.ljust(size)]))
    assert f"{TAR}: " in fault(root)
    rewrite(root / MANIFEST, lambda m: m.update(layouts=[text.replace('"shape"', '"shape" ', 1)[: len(text)]]))
    assert "train-0000.safetensors: another header: expected that of its layout" in fault(root)


def test_a_tar_of_another_set_is_refused(root: Path, tmp_path: Path) -> None:
    extractors = fake_extractors()
    extractors["motion"]["tag"] = "other-motion-v1"
    other = tmp_path / "other"
    with ShardSetWriter(other, extractors) as writer:
        writer.add("train", fake_sample("a", "id", extractors, frames=3))
        writer.finish([], {})
    shutil.copy(other / TAR, root / TAR)
    assert TAR in fault(root)


def test_another_tag_in_a_record_names_both(root: Path) -> None:
    with tarfile.open(root / TAR) as tar:
        record = tar.extractfile("train-0000.json").read()  # type: ignore[union-attr]
    replace_member(root, TAR, "train-0000.json", record.replace(b"random-motion-v1", b"other-motion-v1"))
    message = fault(root)
    assert "sample 'train-0000': extractors: " in message
    assert "other-motion-v1" in message and "random-motion-v1" in message


def test_unknown_split_and_index(root: Path) -> None:
    with pytest.raises(ShardError, match="'test': expected one of train, validation"):
        ShardSet.open(root).split("test")
    for index in (-1, 3):
        with pytest.raises(IndexError):
            ShardSet.open(root).split("train").read(index)
