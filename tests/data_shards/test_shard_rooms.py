"""Memory of clips that are gone serves the next ones, and never one that someone still holds."""

from __future__ import annotations

import copy
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.fake_shards import write_fake_shards

from data_shards.reader import ShardReader, ShardSet
from data_shards.rooms import Rooms


@pytest.fixture
def reader(tmp_path: Path) -> ShardReader:
    return ShardSet.open(write_fake_shards(tmp_path, clips=12, frames=5)).split("train")


def test_a_piece_is_lent_again_when_the_last_tensor_in_it_is_gone() -> None:
    rooms = Rooms()
    first = rooms.take(5000)
    place, part = first.data_ptr(), first[10:20].view(torch.float16)
    del first
    assert rooms.take(5000).data_ptr() != place  # `part` is still there
    del part
    second, third = rooms.take(5000), rooms.take(5000)
    assert place in (second.data_ptr(), third.data_ptr()) and second.data_ptr() != third.data_ptr()


def test_arrays_and_views_keep_a_piece() -> None:
    rooms = Rooms()
    array = rooms.take(5000).view(torch.int16).numpy()[3:9]
    array[:] = 7
    others = [rooms.take(5000).fill_(1) for _ in range(4)]
    assert (array == 7).all() and len(others) == 4


def test_other_sizes_are_other_pieces() -> None:
    rooms = Rooms()
    places = {rooms.take(size).data_ptr() for size in (4096, 1, 4000, 0)}
    assert len(places) == 1
    assert len(rooms.take(4097)) == 8192 and len(rooms.take(0)) == 4096


def test_no_more_is_kept_than_may_wait() -> None:
    rooms = Rooms(most_free=3 * 4096)
    lent = [rooms.take(4096) for _ in range(8)]
    del lent
    assert _waiting(rooms) == [4096] * 3


def test_the_size_that_came_back_last_is_kept() -> None:
    rooms = Rooms(most_free=3 * 4096)
    lent = [rooms.take(4096) for _ in range(3)]
    del lent
    larger = rooms.take(2 * 4096)
    del larger
    assert _waiting(rooms) == [4096, 2 * 4096]
    too_large = rooms.take(4 * 4096)
    del too_large
    assert _waiting(rooms) == [4096, 2 * 4096]  # it has no room, and takes none


def _waiting(rooms: Rooms) -> list[int]:
    return sorted(len(piece) for pieces in rooms._free.values() for piece in pieces)


def test_a_copy_in_another_process_has_memory_of_its_own() -> None:
    rooms = Rooms()
    rooms.take(10)
    assert copy.copy(rooms)._free == {}


def test_clips_that_are_held_stay_as_they_were(reader: ShardReader) -> None:
    dice, held = random.Random(0), {}
    whole = {index: reader.read(index) for index in range(len(reader))}
    copies = {index: {name: x.clone() for name, x in clip.tensors().items()} for index, clip in whole.items()}
    del whole
    for _ in range(400):
        index, frames = dice.randrange(len(reader)), dice.randrange(1, 6)
        held[index] = reader.read(index, frames), frames
        if len(held) > 5:
            del held[dice.choice(list(held))]
        for other, (clip, count) in held.items():
            assert torch.equal(clip.video, copies[other]["video"][:count])
            assert torch.equal(clip.reference, copies[other]["reference"])


def test_threads_share_the_memory_of_a_reader(reader: ShardReader) -> None:
    sums = [float(reader.read(index).video.double().sum()) for index in range(len(reader))]

    def one(number: int) -> bool:
        index = number % len(reader)
        clips = [reader.read(index, 3), reader.read(index)]
        return float(clips[1].video.double().sum()) == sums[index] and torch.equal(clips[0].video, clips[1].video[:3])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(300)))


def test_reading_on_needs_no_new_memory(reader: ShardReader) -> None:
    places = {reader.read(number % 3, 4).video.data_ptr() for number in range(50)}
    assert len(places) <= 2
