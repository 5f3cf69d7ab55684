"""Every one of 1000 truncations and 1000 flipped bits of a set is found and named; what plain webdataset makes of them.

`pytest -s` shows the counts.
"""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections import Counter
from pathlib import Path

import pytest
import webdataset
from helpers.fake_shards import write_fake_shards

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
