"""Every one of 1000 truncations and 1000 flipped bits of a set is found and named; what plain webdataset makes of them.

`pytest -s` shows the counts.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import warnings
from collections import Counter
from pathlib import Path

import pytest
import webdataset
from helpers.fake_shards import write_fake_shards
from helpers.shard_edits import change_rows, locate, replace_bytes, sums_name

from data_shards.reader import ShardSet
from data_shards.schema import ShardError

CASES = 1000
TAR = "train-000000.tar"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"clips": 3, "frames": 3, "height": 2, "width": 2, "struct_dim": 3, "audio_dim": 4, "validation_clips": 1}
    return write_fake_shards(tmp_path_factory.mktemp("pristine"), flame=True, text_dim=3, **sizes)  # type: ignore[arg-type]


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "shards"))


def found_by(root: Path) -> tuple[str, str]:
    """(the first of open, read and verify that finds a fault, its message); ("nothing", "") if none does."""
    step = "open"
    try:
        opened = ShardSet.open(root)
        step = "read"
        for split in ("train", "validation"):
            reader = opened.split(split)
            for index in range(len(reader)):
                reader.read(index)
        step = "verify"
        opened.verify()
    except ShardError as error:
        assert "\n" not in str(error) and "expected" in str(error)
        return step, str(error)
    return "nothing", ""


def kind_of(name: str) -> str:
    kinds = {"manifest.json": "manifest", "index.safetensors": "index"}
    return kinds.get(name, "sums" if name.endswith(".safetensors") else "tar")


def test_every_truncation_is_found_and_named(pristine: Path, root: Path) -> None:
    files = {path.name: path.read_bytes() for path in sorted(pristine.iterdir())}
    dice, counts = random.Random(0), Counter[str]()
    for case in range(CASES):
        name = sorted(files)[case % len(files)]
        (root / name).write_bytes(files[name][: dice.randrange(len(files[name]))])
        step, message = found_by(root)
        assert name in message, f"{name} {message}"
        counts[f"{kind_of(name)} found by {step}"] += 1
        (root / name).write_bytes(files[name])
    print(f"\n{CASES} truncations: {dict(sorted(counts.items()))}")
    assert sum(counts.values()) == CASES and not any("nothing" in key for key in counts)


@pytest.mark.parametrize("kind", ["tar", "sums", "index", "manifest"])
def test_every_flipped_bit_is_found_and_named(pristine: Path, root: Path, kind: str) -> None:
    files = {path.name: path.read_bytes() for path in sorted(pristine.iterdir()) if kind_of(path.name) == kind}
    places = [(name, position) for name, data in files.items() for position in range(len(data))]
    dice, counts = random.Random(1), Counter[str]()
    for _ in range(CASES):
        name, position = dice.choice(places)
        data = bytearray(files[name])
        data[position] ^= 1 << dice.randrange(8)
        (root / name).write_bytes(data)
        step, message = found_by(root)
        # A changed name or sum in the manifest shows as a disagreement: with the file that the manifest then lists.
        assert name in message or "manifest" in message, f"{name} byte {position}: {message}"
        counts[step] += 1
        (root / name).write_bytes(files[name])
    print(f"\n{CASES} flipped bits in {kind}: found by {dict(sorted(counts.items()))}")
    assert "nothing" not in counts and sum(counts.values()) == CASES


def test_every_byte_of_a_manifest_counts(root: Path) -> None:
    path = root / "manifest.json"
    data = path.read_bytes()
    path.write_bytes(data[:-1])  # a newline: the same JSON, yet not the same file
    assert found_by(root)[0] == "open"
    document = json.loads(data)
    for key in document:
        path.write_bytes(data.replace(f'"{key}"'.encode(), f'"{key}~"'.encode(), 1))
        assert found_by(root)[0] == "open", key


def test_a_manifest_edited_by_hand_opens_but_is_not_verified(root: Path) -> None:
    path = root / "manifest.json"
    document = json.loads(path.read_bytes())
    document["statistics"]["struct"]["std"][0] += 1.0
    path.write_text(json.dumps(document))
    step, message = found_by(root)
    assert step == "verify" and "manifest.json: sha256: " in message
    path.write_text(json.dumps(document, indent=1) + "\n")
    step, message = found_by(root)
    assert step == "open" and "manifest.json: sha256: " in message


def flip(root: Path, name: str, position: int) -> None:
    data = bytearray((root / name).read_bytes())
    data[position] ^= 4
    (root / name).write_bytes(data)


def other_identity(root: Path) -> None:
    clip = locate(root)[1]
    data = (root / TAR).read_bytes()[clip.record.offset :][: clip.record.size]
    replace_bytes(root, TAR, 1, "record", data.replace(b'"identity":', b'"identitx":', 1))


# What happens to the second clip, the file in which that is seen, and what of the clip is wrong there.
PLACES = {
    "record": (lambda root: flip(root, TAR, locate(root)[1].record.offset), TAR, "train-0001.json"),
    "identity": (other_identity, TAR, "train-0001.json"),
    "tensor": (lambda root: flip(root, TAR, locate(root)[1].tensors["struct"].offset), TAR, "struct"),
    "truncated": (lambda root: os.truncate(root / TAR, locate(root)[1].record.offset), TAR, "train-0001.json"),
    "gone": (lambda root: (root / TAR).unlink(), TAR, ""),
    "other-sums": (lambda root: change_rows(root, TAR, lambda rows: rows.__setitem__((1, 0), 7)), TAR,
                   "train-0001.json"),
    "sums": (lambda root: flip(root, sums_name(TAR), -1), sums_name(TAR), "checksums"),
    "no-sums": (lambda root: (root / sums_name(TAR)).unlink(), sums_name(TAR), ""),
}  # fmt: skip


@pytest.mark.parametrize("frames", [None, 2])
@pytest.mark.parametrize("case", PLACES)
def test_a_fault_of_a_clip_carries_its_file_and_member(root: Path, case: str, frames: int | None) -> None:
    """By themselves and not only in its text, also from process to process."""
    change, shard, member = PLACES[case]
    reader = None
    if case not in ("identity", "other-sums"):  # opened before the files change: opening would find it
        reader = ShardSet.open(root).split("train")
    change(root)
    reader = reader or ShardSet.open(root).split("train")
    with pytest.raises(ShardError) as caught:
        reader.read(1 if case != "sums" else 2, frames)
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):
        assert (error.shard, error.member) == (shard, member) and str(error) == str(caught.value)
        assert f"{root / shard}: " in str(error)


@pytest.mark.parametrize(("place", "member"), [("record", "train-0001.json"), ("payload", "train-0001.safetensors")])
def test_a_fault_of_the_tar_is_one_of_the_member(root: Path, place: str, member: str) -> None:
    """Its headers, which are looked at with the whole clip."""
    reader, clip = ShardSet.open(root).split("train"), locate(root)[1]
    flip(root, TAR, getattr(clip, place).offset - 512)
    with pytest.raises(ShardError, match="another tar header") as caught:
        reader.read(1)
    assert (caught.value.shard, caught.value.member) == (TAR, member)


def read_plainly(tar: Path, go_on: bool) -> list[tuple[bytes, bytes]] | None:
    """Members of every sample as webdataset gives them, None if it raises."""
    handler = webdataset.handlers.ignore_and_continue if go_on else webdataset.handlers.reraise_exception
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            samples = list(webdataset.WebDataset(str(tar), shardshuffle=False, handler=handler))
    except Exception:  # whatever it raises is a notice
        return None
    return [(sample.get("json", b""), sample.get("safetensors", b"")) for sample in samples]


@pytest.mark.parametrize("damage", ["truncation", "flipped bit"])
@pytest.mark.parametrize("go_on", [False, True], ids=["default", "ignore_and_continue"])
def test_plain_webdataset_beside_it(pristine: Path, root: Path, damage: str, go_on: bool) -> None:
    data, dice, counts = (pristine / TAR).read_bytes(), random.Random(2), Counter[str]()
    whole = read_plainly(pristine / TAR, go_on)
    for _ in range(CASES):
        place = dice.randrange(len(data))
        broken = bytearray(data)
        if damage == "truncation":
            del broken[place:]
        else:
            broken[place] ^= 1 << dice.randrange(8)
        (root / TAR).write_bytes(broken)
        seen = read_plainly(root / TAR, go_on)
        same = "all samples, unchanged" if seen == whole else "other samples, silently"
        counts["an error" if seen is None else same] += 1
        assert found_by(root)[0] != "nothing"
    print(f"\nwebdataset, {CASES} times a {damage}, go_on={go_on}: {dict(sorted(counts.items()))}")
    assert sum(counts.values()) == CASES
