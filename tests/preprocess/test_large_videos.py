"""8K takes no more memory than its pictures need: nothing is left behind by a stage, and the heap is not torn."""

from __future__ import annotations

import weakref
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from helpers import large_videos
from helpers.clips import textured, write_frames

from dualforce.codecs import face_box
from dualforce.codecs.face_box import square_crop
from dualforce.codecs.media import Treatment, container, iter_frames, pictures, write_video
from dualforce.preprocess.job import Job
from dualforce.preprocess.models import Models
from dualforce.preprocess.pool import run_tasks
from dualforce.preprocess.quality import Limits
from dualforce.preprocess.work import Task, times_of

MOST = {"h264": 1000, "hevc": 1434}  # MiB, 1.4 GiB at most: 930 and 1360 were measured


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("codec", list(large_videos.CODECS))
def test_a_worker_takes_8k_with_a_real_face(codec: str, clips_dir: Path, landmarker_file: Path, tmp_path: Path) -> None:
    """All stages and networks, as a build runs them."""
    video = tmp_path / "8k.mp4"
    large_videos.make_8k(clips_dir / "video" / "man_map_5s.mp4", video, codec)
    for name in ("results", "scratch"):
        (tmp_path / name).mkdir()
    limits = Limits(speech_share=0.0, sharpness=0.0)  # the picture was blown up
    job = Job(video, video.name, "key", "who", "", 0, 128, limits, None, landmarker_file, tmp_path / "scratch")
    task = Task("0" * 64, job, tmp_path / "results", tmp_path / "scratch", times_of(video))
    [(_, found)] = run_tasks([task], large_videos.perform_measured, ["cpu"], Models)
    print(f"\n{codec}: {found}")
    assert found is not None and found["samples"] == 1 and not found["rejected"]
    assert found["peak"] < MOST[codec]


def test_large_blocks_do_not_tear_the_heap_of_a_worker() -> None:
    """Five blocks and the small ones are 165 MiB at most; with glibc's own rule it grows to 290 and more."""
    [(_, grown)] = run_tasks([100], large_videos.tear_the_heap, ["cpu"], large_videos.nothing)
    assert grown is not None and 100 < grown < 230


def test_freed_memory_goes_back() -> None:
    [(_, found)] = run_tasks([200], large_videos.fill_and_free, ["cpu"], large_videos.nothing)
    assert found is not None
    freed, given_back = found
    assert freed > 150 and given_back < 50


@pytest.mark.parametrize("read", [100, 3])
def test_it_goes_back_once_the_decoder_is_gone(read: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the pictures are not read to the end."""
    write_video(tmp_path / "a.mp4", textured(8), None)
    open_at: list[bool] = []
    made: list[Any] = []
    whole = pictures.stream_of

    def noted(*given: Any) -> Any:
        made.append(whole(*given))
        return made[-1]

    monkeypatch.setattr(pictures, "stream_of", noted)
    monkeypatch.setattr(pictures, "give_back_memory", lambda: open_at.append(bool(made[-1].container.streams)))
    frames = iter_frames(tmp_path / "a.mp4")
    for _ in zip(range(read), frames, strict=False):
        assert not open_at
    frames.close()  # type: ignore[attr-defined]
    assert open_at == [False]


def reordered(path: Path, count: int = 30, rate: int = 25) -> Path:
    """H.264 with pictures that are shown later than they are decoded."""
    options = {"preset": "ultrafast", "bf": "3", "b-pyramid": "normal", "b_strategy": "0", "refs": "5"}
    frames = [
        av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p") for picture in textured(count)
    ]
    write_frames(path, frames, "libx264", Fraction(rate), options)
    return path


def test_a_large_frame_makes_room_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder has one buffer fewer where a frame is made a picture before the next one is decoded."""
    monkeypatch.setattr(container, "MAX_THREADS", 1)
    video = reordered(tmp_path / "a.mp4")
    seen: dict[int, set[int]] = {}
    for large in (2**24, 1):
        monkeypatch.setattr(pictures, "LARGE", large)
        buffers = seen[large] = set()
        monkeypatch.setattr(Treatment, "add", lambda _, frame, __: buffers.add(frame.planes[0].buffer_ptr))  # noqa: B023
        assert len(list(iter_frames(video, treatment=Treatment()))) == 30
    assert len(seen[1]) == len(seen[2**24]) - 1


@pytest.mark.parametrize(("count", "rate"), [(30, 10), (29, 10), (30, 25), (30, 60)])
@pytest.mark.parametrize(("step", "last"), [(1, False), (4, True), (5, True)])
def test_large_frames_give_the_same_pictures(
    count: int, rate: int, step: int, last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the final picture is on screen at a multiple of `step` and after it (29 at 10 a second: 70 to 72)."""
    video = reordered(tmp_path / "a.mp4", count, rate)
    ordinary = list(iter_frames(video, step=step, last=last))
    monkeypatch.setattr(pictures, "LARGE", 1)
    large = list(iter_frames(video, step=step, last=last))
    assert [k for k, _ in ordinary] == [k for k, _ in large]
    for (_, one), (_, other) in zip(ordinary, large, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("large", [2**24, 1])
def test_a_picture_is_not_held_while_it_is_worked_on(
    large: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "LARGE", large)
    for _, picture in iter_frames(reordered(tmp_path / "a.mp4")):
        held = weakref.ref(picture)
        del picture
        assert held() is None


def test_a_crop_takes_room_for_one_part_of_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a large picture a few rows at a time are turned into float numbers, always in the same room."""
    sizes: list[int] = []
    empty = face_box.torch.empty

    def noted(*shape: int) -> Any:
        sizes.append(int(np.prod(shape)))
        return empty(*shape)

    monkeypatch.setattr(face_box.torch, "empty", noted)
    picture = np.random.default_rng(0).integers(0, 256, (2000, 2000, 3)).astype(np.uint8)
    crop = square_crop(picture, np.array([1000.0, 1000.0, 1900.0]), 256)
    assert crop.std() > 3
    assert len(sizes) == 3 and max(sizes) < 0.2 * picture.size
