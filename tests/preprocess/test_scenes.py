"""Cuts are found at the exact pixel frame, wherever they lie, and nowhere else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.clips import sidecar_json, textured, tone, write_sidecar

from dualforce.codecs.media import iter_frames, write_video
from dualforce.preprocess.job import Job
from dualforce.preprocess.process import process_video
from dualforce.preprocess.quality import Limits
from dualforce.preprocess.sample_file import load_sample
from dualforce.preprocess.scenes import TAG, Scene, find_scenes, scenes_of
from dualforce.preprocess.windows import plan_windows

SIDE = 160


def head(path: Path, count: int, first: int = 0, side: int = SIDE) -> list[np.ndarray]:
    """Pixel frames [side,side,3] from `first` on of a clip."""
    found = []
    for index, picture in iter_frames(path, max_side=side):
        square = np.zeros((side, side, 3), np.uint8)
        square[: picture.shape[0], : picture.shape[1]] = picture
        if index >= first:
            found.append(square)
        if len(found) == count:
            break
    return found


def starts(pictures: Sequence[np.ndarray]) -> list[int]:
    return [scene.start for scene in scenes_of(pictures).parts]


@pytest.fixture(scope="module")
def heads(clips_dir: Path, sample_dir: Path) -> dict[str, list[np.ndarray]]:
    """The beginnings of eight real and three rendered clips."""
    names = [Path(name).stem for name in json.loads((clips_dir / "MANIFEST.json").read_text())["usable_for_training"]]
    found = {name: head(clips_dir / "video" / f"{name}.mp4", 12) for name in names}
    return found | {name: head(sample_dir / f"{name}.mp4", 12) for name in ("id00", "id01", "id02")}


def test_cuts_between_any_two_clips(heads: dict[str, list[np.ndarray]]) -> None:
    for one in heads:
        for other in heads:
            if one != other:
                assert starts([*heads[one], *heads[other]]) == [0, 12], (one, other)


@pytest.mark.slow
def test_cuts_between_any_two_of_all_clips(sample_dir: Path, clips_dir: Path) -> None:
    """Missed are two clips of one room, and a person and their rendered copy, either way round."""
    paths = [*sorted(sample_dir.glob("*.mp4")), *sorted((clips_dir / "video").iterdir())]
    clips = {path.stem: head(path, 8) for path in paths}
    pairs = [(one, other) for one in clips for other in clips if one != other]
    missed = {pair for pair in pairs if starts([*clips[pair[0]], *clips[pair[1]]]) != [0, 8]}
    print(f"\n{len(pairs) - len(missed)} of {len(pairs)} cuts found; missed: {sorted(missed)}")
    alike = [("man_glasses_silent_8s", "man_silent_7s"), ("may_5s", "may_nerf_generated_11s")]
    assert missed <= {*alike, *((other, one) for one, other in alike)}


def test_cuts_next_to_either_end(heads: dict[str, list[np.ndarray]]) -> None:
    before, after = heads["may_5s"], heads["man_map_5s"]
    for count in range(1, 12):
        assert starts([*before[:count], *after]) == [0, count]
        assert starts([*before, *after[:count]]) == [0, 12]
    assert starts([before[0], after[0]]) == [0, 1]
    assert starts([*before, *after[:3], *before]) == [0, 12, 15]
    assert starts(before[:1]) == [0]


def test_no_cut_where_there_is_none(sample_dir: Path, clips_dir: Path) -> None:
    """The head shake is the strongest motion among the real clips."""
    for path in (sample_dir / "id03.mp4", clips_dir / "video" / "man_expressive_7s.mp4"):
        pictures = head(path, 1000)
        for first in range(0, len(pictures), 9):
            assert starts(pictures[first : first + 60]) == [0], (path.name, first)


def test_steady_strong_motion_has_no_cut() -> None:
    """Colours that run so fast that every picture changes by more than a cut does."""
    for seed in range(6):
        assert starts(textured(85, seed=seed)) == [0], seed


@pytest.mark.slow
def test_no_cut_in_any_whole_clip(sample_dir: Path, clips_dir: Path) -> None:
    for path in [*sorted(sample_dir.glob("*.mp4")), *sorted((clips_dir / "video").iterdir())]:
        assert len(find_scenes(path).parts) == 1, path.name


def faded(one: list[np.ndarray], other: list[np.ndarray], half: int, black: int = 1) -> list[np.ndarray]:
    """Still pictures of a shot that fades to black in `half` pixel frames, and of one that comes up in as many."""
    down = [(one[0] * (1 - k / half)).astype(np.uint8) for k in range(half)]
    up = [(other[0] * ((k + 1) / half)).astype(np.uint8) for k in range(half)]
    return [*one, *down, *[np.zeros_like(one[0])] * black, *up, *other]


@pytest.mark.parametrize("half", [2, 5, 12, 25])
@pytest.mark.parametrize("black", [1, 2, 10])
def test_fades_through_black(heads: dict[str, list[np.ndarray]], half: int, black: int) -> None:
    """Of 0.2 to 2 s, between any two of four clips: no scene shows both shots, and only black ones are cut off."""
    chosen = [heads[name] for name in ("may_5s", "man_map_5s", "lieu_60s", "id01")]
    for one in chosen:
        for other in chosen:
            if one is not other:
                found = starts(faded(one, other, half, black))
                first = 12 + half
                assert len(found) > 1, found
                assert all(first - 1 <= place <= first + black + 1 for place in found[1:]), found


def test_only_the_black_ends_of_a_video_are_cut_off(heads: dict[str, list[np.ndarray]]) -> None:
    black = [np.zeros_like(heads["may_5s"][0])] * 5
    down = [(heads["may_5s"][-1] * (1 - k / 25)).astype(np.uint8) for k in range(25)]
    up = [(heads["may_5s"][0] * (k / 25)).astype(np.uint8) for k in range(25)]
    found = starts([*black, *up, *heads["may_5s"], *down, *black])
    assert all(place <= 6 or place >= 66 for place in found), found


def test_a_dark_room_is_not_black(heads: dict[str, list[np.ndarray]]) -> None:
    """A tenth of a clip's light."""
    for name, pictures in heads.items():
        assert starts([(picture * 0.1).astype(np.uint8) for picture in pictures]) == [0], name


def test_no_pictures() -> None:
    with pytest.raises(ValueError, match="expected at least one"):
        scenes_of([])


@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30_000, 1001), Fraction(50)])
def test_cuts_are_pixel_frames_of_the_25_fps_clock(
    heads: dict[str, list[np.ndarray]], rate: Fraction, tmp_path: Path
) -> None:
    """The cut of a file at another rate lies at the first pixel frame that shows the new shot."""
    pictures = [heads["may_5s"][k // 4] for k in range(40)] + [heads["man_map_5s"][k // 4] for k in range(40)]
    path = tmp_path / "cut.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    first = -(-40 * 25 // rate)  # the first k with k / 25 >= 40 / rate
    assert [scene.start for scene in find_scenes(path).parts] == [0, first]


def test_windows_lie_inside_scenes() -> None:
    scenes = [Scene(0, 0, 100), Scene(1, 100, 150), Scene(2, 150, 320)]
    windows = plan_windows(scenes)
    assert [(w.index, w.scene, w.start) for w in windows] == [(0, 0, 0), (1, 2, 150), (2, 2, 231)]


@pytest.fixture(scope="module")
def three_scenes(sample_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rendered clip, a short piece of a second one, a third one: 85, 30 and 85 pixel frames with their sidecar."""
    folder = tmp_path_factory.mktemp("scenes")
    parts = [("id00", 85), ("id01", 30), ("id02", 85)]
    pictures = [picture for name, count in parts for picture in head(sample_dir / f"{name}.mp4", count, side=256)]
    boxes = []
    for name, count in parts:
        boxes += json.loads((sample_dir / f"{name}.json").read_text())["face_boxes"][:count]
    path = folder / "three.mp4"
    write_video(path, pictures, tone(202))
    write_sidecar(path, sidecar_json(200, face_boxes=boxes))
    return path


def test_a_video_is_split_at_its_cuts(three_scenes: Path, tmp_path: Path) -> None:
    job = Job(three_scenes, "three.mp4", "k", "who", "", 0, 64, Limits(), three_scenes.with_suffix(".json"), None,
              tmp_path)  # fmt: skip
    outcome = process_video(job)
    samples = [load_sample(stem) for stem in outcome.samples]
    assert [sample.meta["scene"] for sample in samples] == [
        {"index": 0, "of": 3, "first": 0, "frames": 85},
        {"index": 2, "of": 3, "first": 115, "frames": 85},
    ]
    assert [sample.meta["first_pixel_frame"] for sample in samples] == [0, 115]
    assert outcome.rejected == (
        {
            "source": "three.mp4",
            "reason": "R_SHORT",
            "detail": "scene 1 (pixel frames 85 to 114): 30 pixel frames: expected at least 81",
            "scene": 1,
        },
    )
    assert {sample.meta["finders"]["scenes"]["tag"] for sample in samples} == {TAG}
    # The crop of each scene is that of its own boxes: nothing is averaged over the cut.
    sidecar = json.loads(three_scenes.with_suffix(".json").read_text())
    for sample in samples:
        rows = np.array(sidecar["face_boxes"])[sample.meta["first_pixel_frame"] :][:81]
        crop = np.array(sample.meta["crop"]["boxes"])
        assert np.abs(crop[:, [0, 2]].mean(axis=1) - rows[:, [0, 2]].mean(axis=1)).max() < 0.1 * np.ptp(crop[0, [0, 2]])


def test_scenes_that_are_all_too_short(three_scenes: Path, tmp_path: Path) -> None:
    limits = Limits(seconds=8.0)
    job = Job(three_scenes, "three.mp4", "k", "who", "", 0, 64, limits, three_scenes.with_suffix(".json"), None,
              tmp_path)  # fmt: skip
    outcome = process_video(job)
    assert not outcome.samples
    detail = "85 pixel frames in the longest of 3 scenes: expected at least 200"
    assert outcome.rejected == ({"source": "three.mp4", "reason": "R_SHORT", "detail": detail},)
