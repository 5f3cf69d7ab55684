"""Values of a clip are judged once, its bytes each time; and bytes that lie together are read at once."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
import torch
from helpers.fake_shards import fake_extractors, fake_sample, write_fake_shards
from helpers.shard_edits import locate, replace_member
from safetensors.torch import save

import data_shards.clip
import data_shards.files
from data_shards.files import Folder, parse_json
from data_shards.reader import ShardReader, ShardSet
from data_shards.schema import MachineError, ShardError

FRAMES = 9
TAR = "train-000000.tar"


def with_nan(root: Path, name: str, frame: int) -> ShardReader:
    """A set whose first clip has a NaN in one frame, with checksums that agree."""
    write_fake_shards(root, clips=2, frames=FRAMES)
    tensors = ShardSet.open(root).split("train").read(0).tensors()
    tensors[name][frame].view(-1)[0] = float("nan")
    key = ShardSet.open(root).split("train").keys[0]
    replace_member(root, TAR, f"{key}.safetensors", save(tensors))
    return ShardSet.open(root).split("train")


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every look at values."""
    sizes: list[int] = []
    judge = data_shards.clip.are_numbers

    def counted(data: object, dtype: str) -> bool:
        sizes.append(len(data))  # type: ignore[arg-type]
        return judge(data, dtype)  # type: ignore[arg-type]

    monkeypatch.setattr(data_shards.clip, "are_numbers", counted)
    return sizes


@pytest.mark.parametrize("frames", [None, 7])
def test_a_wrong_value_is_found_at_every_reading(tmp_path: Path, frames: int | None) -> None:
    reader = with_nan(tmp_path, "video", 6)
    for _ in range(3):
        with pytest.raises(ShardError, match="video: 1 values that are not finite"):
            reader.read(0, frames)
    reader.read(1, frames)


def test_frames_that_were_not_read_have_not_been_judged(tmp_path: Path) -> None:
    reader = with_nan(tmp_path, "video", 6)
    for frames in (3, 6, 6):
        reader.read(0, frames)
    for frames in (7, 8, None, 7):
        with pytest.raises(ShardError, match="not finite"):
            reader.read(0, frames)


def test_sound_beyond_the_crop_has_not_been_judged(tmp_path: Path) -> None:
    reader = with_nan(tmp_path, "audio", 6)
    for frames, beyond in ((3, 0), (6, 0), (3, 3), (5, 1)):
        reader.read(0, frames, beyond)
    for frames, beyond in ((3, 4), (6, 1), (6, 9)):
        with pytest.raises(ShardError, match="audio: 1 values that are not finite"):
            reader.read(0, frames, beyond)


def test_values_are_judged_once_and_bytes_each_time(tmp_path: Path, looked_at: list[int]) -> None:
    root = write_fake_shards(tmp_path, clips=2, frames=FRAMES)
    reader, clip = ShardSet.open(root).split("train"), locate(root)[0]
    reader.read(0, 5, 2)
    first = len(looked_at)
    assert first
    for frames, beyond in ((5, 2), (4, 3), (1, 0), (5, 2)):
        reader.read(0, frames, beyond)
    assert len(looked_at) == first
    reader.read(1, 5, 2)
    reader.read(0, 4, 4)  # more sound than before
    assert len(looked_at) == 3 * first
    reader.read(0, 5, 3)
    assert len(looked_at) == 3 * first  # five frames at first, then eight of sound
    data, at = (root / TAR).read_bytes(), clip.tensors["video"].offset
    (root / TAR).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(ShardError, match="damaged data"):
        reader.read(0, 4, 3)
    assert len(looked_at) == 3 * first


@pytest.mark.parametrize("at_once", [True, False])
def test_ranges_are_filled_as_far_as_the_file_goes(
    tmp_path: Path, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if at_once and not hasattr(os, "preadv"):
        pytest.skip("no preadv here")
    monkeypatch.setattr(data_shards.files, "_READS_AT_ONCE", at_once)
    monkeypatch.setattr(data_shards.files, "_MOST_ROOMS", 2)
    dice = random.Random(0)
    data = dice.randbytes(1000)
    (tmp_path / "x").write_bytes(data)
    for _ in range(300):
        ranges, offset = [], dice.randrange(1100)
        for _ in range(dice.randrange(1, 7)):
            size = dice.choice((0, 1, 50, 400))
            ranges.append((offset, bytearray(size)))
            offset = offset + size if dice.random() < 0.7 else dice.randrange(1100)
        counts = Folder(tmp_path).fill("x", [(start, memoryview(room)) for start, room in ranges])
        for (start, room), count in zip(ranges, counts, strict=True):
            there = data[start : start + len(room)]
            assert count == len(there) and room == there.ljust(len(room), b"\0")


def test_reads_that_bring_less_than_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(1).randbytes(500)
    (tmp_path / "x").write_bytes(data)

    def short(file: int, rooms: list[memoryview], offset: int) -> int:
        part = os.pread(file, 7, offset)
        for room in rooms:
            count = min(len(part), len(room))
            room[:count] = part[:count]
            part = part[count:]
        return 7 - len(part)

    monkeypatch.setattr(os, "preadv", short)
    rooms = [bytearray(size) for size in (3, 0, 90, 5, 200)]
    starts = [10, 13, 13, 103, 108]
    ranges = [(start, memoryview(room)) for start, room in zip(starts, rooms, strict=True)]
    assert Folder(tmp_path).fill("x", ranges) == [3, 0, 90, 5, 200]
    assert b"".join(rooms) == data[10:308]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no list of open files here")
def test_no_file_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def handles() -> int:
        return len(os.listdir("/proc/self/fd"))

    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    (tmp_path / "x").write_bytes(b"abc")
    os.mkfifo(tmp_path / "pipe")
    folder, room = Folder(tmp_path), memoryview(bytearray(3))
    before = handles()
    assert folder.fill("x", [(0, room)]) == [3]
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", fail)
        with pytest.raises(ShardError, match="x: Input/output error"):
            folder.fill("x", [(0, room)])
    with monkeypatch.context() as patch:
        patch.setattr(data_shards.files, "_plain", lambda *_: None)  # it was a file when it was looked at
        with pytest.raises(ShardError, match="pipe: a folder, pipe, socket or device"):
            folder.fill("pipe", [(0, room)])
    assert handles() == before


@pytest.mark.parametrize("text", ["1e999", "-1e400", "[0.5, 1e309]", "1" + 400 * "0" + ".0"])
def test_numbers_that_are_too_large_are_refused(text: str) -> None:
    with pytest.raises(ShardError, match="expected JSON"):
        parse_json(b'{"a": ' + text.encode() + b"}", "x")
    assert parse_json(b'{"a": [1e308, -1e308, 1e-400, 0.0, -0.0]}', "x")["a"] == [1e308, -1e308, 0.0, 0.0, 0.0]


def test_a_file_that_is_gone_once_it_is_open_is_told_of_and_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file server: the handle is stale when the file is looked at again."""
    (tmp_path / "x").write_bytes(b"data")
    opened: list[int] = []

    def stale(file: int) -> os.stat_result:
        opened.append(file)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    folder = Folder(tmp_path)
    for read in (lambda: folder.fill("x", [(0, memoryview(bytearray(4)))]), lambda: folder.digest("x")):
        with monkeypatch.context() as patched:
            patched.setattr(data_shards.files.os, "fstat", stale)
            with pytest.raises(MachineError, match=r"x: .*: expected a machine that can read it"):
                read()
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.fstat(opened[-1])
    assert len(opened) == 2


def test_long_clips_need_no_more_memory_for_their_plan(tmp_path: Path) -> None:
    """A stranger's layout may have a million frames: a plan of it is no larger than that of others."""
    from data_shards.layout import parse_layout
    from data_shards.plan import prefix_plan, whole_plan

    extractors = fake_extractors(channels=1, height=1, width=1, struct_dim=1, audio_dim=1)
    sizes = []
    for frames in (3, 1000):
        payload = save(fake_sample("k", "i", extractors, frames=frames, dtype=torch.float16).tensors())
        layout = parse_layout(payload[8 : 8 + int.from_bytes(payload[:8], "little")].decode(), extractors, "x")
        sizes.append(sum(len(repr(plan)) for plan in (whole_plan(layout), prefix_plan(layout, frames - 1, 1))))
    assert sizes[1] < sizes[0] + 1000
