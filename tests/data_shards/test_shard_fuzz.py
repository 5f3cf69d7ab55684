"""Mutated manifests, indexes, records, safetensors headers and tar headers, with sums that agree: a ShardError of one
line, or the clips as they were written; never anything else."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_shards import write_fake_shards
from helpers.shard_edits import age, locate
from xxhash import xxh3_64_intdigest

from data_shards.layout import pack_row, parse_layout, row_of
from data_shards.reader import ShardSet
from data_shards.schema import ClipSample, ShardError
from data_shards.upgrade import upgrade

TAR, SUMS, INDEX, MANIFEST = "train-000000.tar", "train-000000.sums.safetensors", "index.safetensors", "manifest.json"
OLD_INDEX = "train-000000.index.json"
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 512, 2**31, 2**32, 2**63, -(2**63), 2**64, 10**30, 0.0, 1.5, -1e300, "", "x",
    "a\n", "../x", "pipe:x", "\ud800", "train-000000.tar", "F32", "float32", "bool", "0" * 24, [], [1], [[]], {},
    {"a": 1},    [0, 8], [-8, 0], [1, 2, 3], "\0", "A" * 500,
]  # fmt: skip
TOKENS = [b"NaN", b"Infinity", b"1e999", b"[", b"]", b"{", b"}", b'"', b",", b":", b"null", b"-", b"9" * 30, b"\xff",
          b"\0", b'"a":1,', b"[" * 2000, b"\\u0000", b"\n"]  # fmt: skip


class Target:
    """A good set in memory and on disk, and the means to put a mutated part into it with sums that agree."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = {path.name: path.read_bytes() for path in root.iterdir()}
        self.manifest = json.loads(self.files[MANIFEST])
        self.located = locate(root)[0]
        self.changed: set[str] = set()
        self.clips = self.read()

    def read(self) -> list[ClipSample]:
        opened = ShardSet.open(self.root)
        readers = [opened.split(split) for split in ("train", "validation")]
        for reader in readers:
            for number in range(len(reader)):
                reader.read(number, 1)
        return [reader.read(number) for reader in readers for number in range(len(reader))]

    def put(self, name: str, data: bytes) -> None:
        self.changed.add(name)
        (self.root / name).write_bytes(data)

    def put_summed(self, **files: bytes) -> None:
        """Index and checksums, with a manifest that agrees."""
        manifest = {**self.manifest, "files": {**self.manifest["files"]}}
        for kind, data in files.items():
            name = {"index": INDEX, "sums": SUMS}[kind]
            self.put(name, data)
            manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self.put(MANIFEST, json.dumps(manifest).encode())

    def put_row(self, row: bytes) -> None:
        """Other checksums of the first clip."""
        sums, index = bytearray(self.files[SUMS]), bytearray(self.files[INDEX])
        sums[1024 : 1024 + len(row)] = row
        index[1024:1032] = struct.pack("<Q", xxh3_64_intdigest(row))
        self.put_summed(sums=bytes(sums), index=bytes(index))

    def put_member(self, kind: str, data: bytes) -> None:
        """A member of another size keeps the length of its place: cut, or filled with zeros or blanks."""
        place = self.located.record if kind == "json" else self.located.payload
        data = data[: place.size].ljust(place.size, b" " if kind == "json" else b"\0")
        self.put_tar(place.offset, data)
        members = {"json": self.member("json"), "safetensors": self.member("safetensors"), kind: data}
        text = self.located.header[8:].decode()
        layout = parse_layout(text, self.manifest["extractors"], "layout")
        self.put_row(pack_row(row_of(members["json"], members["safetensors"], layout)))

    def member(self, kind: str) -> bytes:
        place = self.located.record if kind == "json" else self.located.payload
        return self.files[TAR][place.offset : place.offset + place.size]

    def put_tar(self, offset: int, data: bytes) -> None:
        self.changed.add(TAR)
        with open(self.root / TAR, "r+b") as file:
            file.seek(offset)
            file.write(data)

    def restore(self) -> None:
        for name in self.changed:
            (self.root / name).write_bytes(self.files[name])
        self.changed.clear()


def mutated_bytes(data: bytes, dice: random.Random) -> bytes:
    """One to three small changes anywhere."""
    changed = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        start = dice.randrange(len(changed) + 1)
        end = min(len(changed), start + dice.choice((1, 1, 2, 4, 8, 64)))
        match dice.randrange(5):
            case 0 if start < len(changed):
                changed[start] ^= 1 << dice.randrange(8)
            case 1:
                del changed[start:end]
            case 2:
                changed[start:start] = changed[start:end]
            case 3:
                changed[start:start] = dice.choice(TOKENS)
            case _:
                changed[start:end] = dice.choice(TOKENS)
    return bytes(changed)


def mutated_json(data: bytes, dice: random.Random) -> bytes:
    """Another value, another key, a key or item less or twice, at a random place of the document."""
    document = json.loads(data)
    for _ in range(dice.choice((1, 1, 2))):
        value = copy.deepcopy(dice.choice(VALUES))  # or a later change would alter the table
        holder, key = dice.choice(list(places(document)) or [(document, None)])
        if key is None:
            return json.dumps(value).encode()
        match dice.randrange(4):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[str(value)] = holder.pop(key)
            case 2 if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            case 3 if type(holder[key]) is int:
                holder[key] += dice.choice((-512, -8, -1, 1, 4, 512))
            case _:
                holder[key] = value
    return json.dumps(document).encode()


def places(value: Any) -> Any:
    """(holder, key) of every value inside `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from places(item)


def mutate(data: bytes, dice: random.Random) -> bytes:
    return (mutated_json if dice.random() < 0.6 else mutated_bytes)(data, dice)


def fuzz_manifest(target: Target, dice: random.Random) -> None:
    target.put(MANIFEST, mutate(target.files[MANIFEST], dice))


def fuzz_layout(target: Target, dice: random.Random) -> None:
    text = mutate(target.manifest["layouts"][0].encode(), dice).decode("latin-1")
    text = text.ljust(len(target.manifest["layouts"][0])) if dice.random() < 0.5 else text
    layouts = [text] if dice.random() < 0.8 else [*target.manifest["layouts"], text]
    target.put(MANIFEST, json.dumps({**target.manifest, "layouts": layouts}).encode())


def fuzz_index(target: Target, dice: random.Random) -> None:
    target.put_summed(index=mutated_columns(target.files[INDEX], dice))


def fuzz_sums(target: Target, dice: random.Random) -> None:
    if dice.random() < 0.5:
        target.put_summed(sums=mutated_columns(target.files[SUMS], dice))
        return
    row = mutated_bytes(target.files[SUMS][1024:], dice)
    target.put_row(row[: len(target.files[SUMS]) - 1024].ljust(len(target.files[SUMS]) - 1024, b"\0"))


def mutated_columns(data: bytes, dice: random.Random) -> bytes:
    """Another header, or other bytes in the columns, or anything anywhere."""
    match dice.randrange(3):
        case 0:
            header = mutate(data[8:1024].rstrip(), dice)
            return data[:8] + header.ljust(1016)[:1016] + data[1024:]
        case 1:
            changed = bytearray(data)
            for _ in range(dice.choice((1, 1, 2, 5))):
                changed[dice.randrange(1024, len(changed))] = dice.choice((0, 1, 2, 10, 47, 65, 127, 128, 255))
            return bytes(changed)
        case _:
            return mutated_bytes(data, dice)


def fuzz_record(target: Target, dice: random.Random) -> None:
    target.put_member("json", mutate(target.member("json"), dice))


def fuzz_header(target: Target, dice: random.Random) -> None:
    payload = target.member("safetensors")
    size = struct.unpack("<Q", payload[:8])[0]
    header = mutate(payload[8 : 8 + size], dice)
    stated = dice.choice((len(header),) * 9 + (0, 1, size, 2**31, 2**63, 2**64 - 1, 10**8, len(payload) - 8))
    # In half of the cases filled up to the old length, so that the tensors stay where they were.
    header = header.ljust(size) if dice.random() < 0.5 else header
    target.put_member("safetensors", struct.pack("<Q", stated) + header + payload[8 + size :])


def fuzz_tar_header(target: Target, dice: random.Random) -> None:
    place = dice.choice((target.located.record, target.located.payload))
    header = bytearray(mutated_bytes(target.files[TAR][place.offset - 512 : place.offset], dice)[:512].ljust(512))
    if dice.random() < 0.7:
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    target.put_tar(place.offset - 512, bytes(header))


FUZZERS: dict[str, Callable[[Target, random.Random], None]] = {
    "manifest": fuzz_manifest,
    "layout": fuzz_layout,
    "index": fuzz_index,
    "checksums": fuzz_sums,
    "record": fuzz_record,
    "safetensors header": fuzz_header,
    "tar header": fuzz_tar_header,
}


def same(one: ClipSample, other: ClipSample) -> bool:
    return (one.key, one.identity) == (other.key, other.identity) and all(
        value is not None and torch.equal(value, other.tensors()[name]) and value.dtype == other.tensors()[name].dtype
        for name, value in one.tensors().items()
    )


def check(target: Target, case: int) -> str:
    """Run one case, a function of its number alone; what became of it."""
    dice = random.Random(case)
    name = list(FUZZERS)[case % len(FUZZERS)]
    FUZZERS[name](target, dice)
    try:
        clips = target.read()
    except ShardError as error:
        message = str(error)
        assert message.isprintable() and "expected" in message and len(message) < 1500, f"case {case}: {message!r}"
        return f"{name}: refused"
    finally:
        target.restore()
    assert len(clips) == len(target.clips), f"case {case}"
    assert all(same(one, other) for one, other in zip(clips, target.clips, strict=True)), f"case {case}"
    return f"{name}: read as written"


def fuzz(root: Path, cases: range) -> None:
    target = Target(write_fake_shards(root, clips=1, frames=2, height=1, width=1, struct_dim=2, audio_dim=2, flame=True,
                                      text_dim=2, validation_clips=1))  # fmt: skip
    counts = Counter(check(target, case) for case in cases)
    print(f"\n{len(cases)} mutants: {dict(sorted(counts.items()))}")
    assert all(any(key.startswith(name) and "refused" in key for key in counts) for name in FUZZERS)


def test_ten_thousand_mutants(tmp_path: Path) -> None:
    fuzz(tmp_path, range(10_000))


@pytest.mark.parametrize("version", [1, 2])
def test_mutants_of_an_old_set_do_not_become_another_set(tmp_path: Path, version: int) -> None:
    new = write_fake_shards(tmp_path / "new", clips=2, frames=2, height=1, width=1, struct_dim=2, audio_dim=2)
    old = age(Path(shutil.copytree(new, tmp_path / "old")), version)
    good = {name: (old / name).read_bytes() for name in (OLD_INDEX, MANIFEST)}
    wanted = {path.name: path.read_bytes() for path in new.iterdir() if path.name != MANIFEST}
    counts = Counter[str]()
    for case in range(500):
        dice, out = random.Random(case), tmp_path / "out"
        data = mutate(good[OLD_INDEX], dice)
        (old / OLD_INDEX).write_bytes(data)
        manifest = json.loads(good[MANIFEST])
        manifest["files"][OLD_INDEX] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        text = json.dumps(manifest).encode()
        (old / MANIFEST).write_bytes(mutate(text, dice) if case % 4 == 0 else text)
        try:
            upgrade(old, out)
        except ShardError as error:
            assert "\n" not in str(error) and not out.exists(), f"case {case}"
            counts["refused"] += 1
            continue
        ShardSet.open(out).verify()
        made = {path.name: path.read_bytes() for path in out.iterdir() if path.name != MANIFEST}
        assert made.keys() == wanted.keys() and made[TAR] == wanted[TAR], f"case {case}"
        counts["upgraded"] += 1
        shutil.rmtree(out)
    print(f"\n500 mutants of version {version}: {dict(counts)}")
    assert counts["upgraded"] and counts["refused"] > 400  # both answers were tried


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(4))
def test_a_million_mutants(tmp_path: Path, part: int) -> None:
    fuzz(tmp_path, range(10_000 + part * 250_000, 10_000 + (part + 1) * 250_000))
