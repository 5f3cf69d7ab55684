"""The first latent frames of a clip by byte range: equal to the whole clip's, checked by frame, no byte more."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fake_shards import fake_extractors, fake_sample, write_fake_shards
from helpers.shard_edits import Located, change_rows, locate, replace_member
from safetensors.torch import save

from data_shards.files import Folder
from data_shards.reader import ShardReader, ShardSet
from data_shards.schema import TIME_FIELDS, ClipSample, ShardError, validate
from dualforce.data.windows import audio_windows

TAR, SUMS, FRAMES, CLIPS = "train-000000.tar", "train-000000.sums.safetensors", 9, 3


@pytest.fixture(scope="module", params=["plain", "flame_text"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    more: dict[str, Any] = {"flame": True, "text_dim": 6} if request.param == "flame_text" else {}
    return write_fake_shards(tmp_path_factory.mktemp("prefix"), clips=CLIPS, frames=FRAMES, **more)


@pytest.fixture
def reader(root: Path) -> ShardReader:
    return ShardSet.open(root).split("train")


@pytest.fixture
def damaged(root: Path) -> Iterator[Any]:
    """Damage the tar at a byte, until the test ends."""
    data = (root / TAR).read_bytes()

    def flip(position: int) -> None:
        (root / TAR).write_bytes(data[:position] + bytes([data[position] ^ 8]) + data[position + 1 :])

    yield flip
    (root / TAR).write_bytes(data)


def stride(clip: Located, name: str) -> int:
    return clip.tensors[name].size // clip.parts[name]


def needed(clip: Located, number: int, frames: int, beyond: int) -> list[tuple[str, int, int]]:
    """(file, offset, size) of what a prefix consists of: checksums, JSON member and the frames of every tensor."""
    words = 1 + sum(clip.parts.values())
    ranges = [(SUMS, 1024 + 8 * words * number, 8 * words), (TAR, *clip.record)]
    for name, tensor in clip.tensors.items():
        rows = min(frames + beyond, FRAMES) if name == "audio" else frames
        ranges.append((TAR, tensor.offset, stride(clip, name) * rows if name in TIME_FIELDS else tensor.size))
    return ranges


def assert_prefix(part: ClipSample, whole: ClipSample, frames: int, beyond: int) -> None:
    assert (part.key, part.identity, part.meta, part.frames) == (whole.key, whole.identity, whole.meta, frames)
    assert part.tensors().keys() == whole.tensors().keys()
    for name, tensor in whole.tensors().items():
        rows = frames + beyond if name == "audio" else frames
        expected = tensor[:rows] if name in TIME_FIELDS else tensor
        assert part.tensors()[name].dtype == expected.dtype and torch.equal(part.tensors()[name], expected), name
        assert part.tensors()[name].is_contiguous()


def test_every_prefix_is_that_of_the_whole(reader: ShardReader) -> None:
    for index in range(CLIPS):
        whole = reader.read(index)
        for frames in range(1, FRAMES + 1):
            for beyond in (0, 1, 2, 100):
                assert_prefix(reader.read(index, frames, beyond), whole, frames, beyond)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    reader = ShardSet.open(write_fake_shards(tmp_path, clips=1, frames=4, dtype=dtype, text_dim=3)).split("train")
    assert_prefix(reader.read(0, 2), reader.read(0), 2, 0)


@pytest.mark.parametrize("context", [0, 1, 6, 8, 9, 20])
def test_audio_windows_are_those_of_the_whole_clip(reader: ShardReader, context: int) -> None:
    beyond = -(-context // 8)
    for frames in range(1, FRAMES + 1):
        part, whole = reader.read(0, frames, beyond), reader.read(0)
        assert torch.equal(audio_windows(part.audio, frames, context), audio_windows(whole.audio, frames, context))


@pytest.mark.parametrize(("frames", "beyond"), [(1, 0), (4, 0), (4, 2), (8, 5)])
def test_only_the_needed_bytes_are_read(
    root: Path, reader: ShardReader, monkeypatch: pytest.MonkeyPatch, frames: int, beyond: int
) -> None:
    seen: list[tuple[str, int, int]] = []
    fill = Folder.fill

    def record(source: Folder, name: str, ranges: Any) -> list[int]:
        seen.extend((name, offset, len(room)) for offset, room in ranges)
        return fill(source, name, ranges)

    wanted = needed(locate(root)[1], 1, frames, beyond)
    monkeypatch.setattr(Folder, "fill", record)
    reader.read(1, frames, beyond)
    assert sorted(seen) == sorted(wanted)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes as Linux does")
def test_the_system_was_asked_for_no_more(root: Path, reader: ShardReader) -> None:
    def read_so_far() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("rchar")).split()[1])

    used, wanted = [], sum(size for _, _, size in needed(locate(root)[1], 1, 2, 0))
    for _ in range(5):  # the least, because other threads of the process may read at the same time
        before, began = read_so_far(), read_so_far()
        reader.read(1, 2)
        used.append(read_so_far() - began - (began - before))  # less what the counting itself reads
    assert abs(min(used) - wanted) <= 64


def test_a_flipped_bit_in_the_prefix_is_named(root: Path, reader: ShardReader, damaged: Any) -> None:
    clip = locate(root)[1]
    for name, tensor in clip.tensors.items():
        rows = 3 if name in TIME_FIELDS else 1
        for frame in range(rows):
            damaged(tensor.offset + frame * stride(clip, name) + stride(clip, name) // 2)
            where = f" of latent frame {frame}" if name in TIME_FIELDS else ""
            named = rf"{TAR}: sample 'train-0001': {name}: xxh3 [0-9a-f]{{16}}{where}: expected .* \(damaged data\)"
            with pytest.raises(ShardError, match=named):
                reader.read(1, 3)
            reader.read(0, 3)
    damaged(clip.record.offset + 9)
    with pytest.raises(ShardError, match=r"sample 'train-0001': train-0001.json: xxh3 .*damaged"):
        reader.read(1, 3)


def test_a_flipped_bit_outside_the_prefix_is_not_read(root: Path, reader: ShardReader, damaged: Any) -> None:
    whole, clip = reader.read(1), locate(root)[1]
    for name, tensor in clip.tensors.items():
        if name not in TIME_FIELDS:
            continue
        damaged(tensor.offset + stride(clip, name) * 5)
        assert_prefix(reader.read(1, 5 if name != "audio" else 4), whole, 5 if name != "audio" else 4, 0)
        with pytest.raises(ShardError, match="damaged data"):
            reader.read(1)
        with pytest.raises(ShardError, match=f"{name}: xxh3 .* of latent frame 5"):
            reader.read(1, 6)
    damaged(clip.tensors["audio"].offset + stride(clip, "audio") * 5)
    reader.read(1, 4, beyond=1)
    with pytest.raises(ShardError, match=r"audio: xxh3 .* of latent frame 5"):
        reader.read(1, 4, beyond=2)


def test_frames_outside_the_clip(reader: ShardReader) -> None:
    for frames in (0, -1, FRAMES + 1):
        with pytest.raises(ShardError, match=rf"sample 'train-0000': frames: {frames}: expected 1 to {FRAMES}"):
            reader.read(0, frames)
    with pytest.raises(ValueError, match="beyond: -1"):
        reader.read(0, 2, beyond=-1)
    with pytest.raises(IndexError):
        reader.read(CLIPS, 2)


def test_truncation_after_opening(root: Path, reader: ShardReader) -> None:
    data, located = (root / TAR).read_bytes(), locate(root)[2]
    try:
        (root / TAR).write_bytes(data[: located.tensors["video"].offset + 10])
        with pytest.raises(ShardError, match=rf"{TAR}: sample 'train-0002': video: 10 bytes: expected .*truncated"):
            reader.read(2, 2)
    finally:
        (root / TAR).write_bytes(data)


def test_tensors_are_the_readers_own(reader: ShardReader) -> None:
    first = reader.read(0, 3)
    for tensor in first.tensors().values():
        tensor.zero_()
    assert_prefix(reader.read(0, 3), reader.read(0), 3, 0)


def test_several_threads(reader: ShardReader) -> None:
    whole = [reader.read(index) for index in range(CLIPS)]

    def one(number: int) -> None:
        assert_prefix(reader.read(number % CLIPS, 1 + number % 5), whole[number % CLIPS], 1 + number % 5, 0)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(200)))


def test_what_a_prefix_must_still_keep(tmp_path: Path) -> None:
    root = write_fake_shards(tmp_path, clips=2, frames=4)
    tensors = ShardSet.open(root).split("train").read(0).tensors()
    tensors["video"][1, 0, 0, 0] = float("nan")
    replace_member(root, TAR, "train-0000.safetensors", save(tensors))
    reader = ShardSet.open(root).split("train")
    reader.read(0, 1)
    with pytest.raises(ShardError, match=r"video: 1 values that are not finite, the first at \[1, 0, 0, 0\]"):
        reader.read(0, 2)


def test_longer_audio_only_where_it_is_asked_for() -> None:
    extractors = fake_extractors()
    clip = fake_sample("a", "id", extractors, frames=4)
    part = ClipSample(**{**vars(clip), "video": clip.video[:2], "struct": clip.struct[:2], "voiced": clip.voiced[:2]})
    validate(part, "here", extractors, beyond=2)
    for beyond in (0, 1, 3):
        with pytest.raises(ShardError, match=rf"audio: shape \[4, 8, 12\]: expected \[{2 + beyond}, 8, 12\]"):
            validate(part, "here", extractors, beyond=beyond)


def test_wrong_sums_of_later_frames_do_not_matter_before_them(tmp_path: Path) -> None:
    root = write_fake_shards(tmp_path, clips=2, frames=4)
    change_rows(root, TAR, lambda rows: rows.__setitem__((0, 1 + 4 + 1 + 2), 0))  # record, video, reference, struct
    reader = ShardSet.open(root).split("train")
    reader.read(0, 2)
    for frames in (3, 4):
        with pytest.raises(ShardError, match=r"struct: xxh3 .* of latent frame 2: expected 0000000000000000"):
            reader.read(0, frames)
