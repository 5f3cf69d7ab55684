"""Dissolves from one shot into the next are found whole, and nothing else is taken for one."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.clips import write_frames

from dualforce.codecs.media import iter_frames
from dualforce.preprocess import dissolves, windows
from dualforce.preprocess.dissolves import SURE, Dissolves
from dualforce.preprocess.scenes import PIECE, Scene, _parts, find_scenes
from dualforce.preprocess.windows import plan_windows

SIDE = 160
AROUND = 15  # pixel frames of each shot alone, as many as the shortest clips have
BEYOND = 50  # pixel frames that are given up on both sides together at most
LENGTHS = (5, 13, 25, 50)  # mixed pixel frames: 0.2 to 2 s


def squares(path: Path, count: int = 150, first: int = 0) -> np.ndarray:
    """The middle of the first pixel frames, [P,160,160,3]: no edge is common to two clips."""
    found = []
    for index, picture in iter_frames(path):
        if index >= first + count:
            break
        if index >= first:
            side = min(picture.shape[:2])
            top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
            square = np.ascontiguousarray(picture[top : top + side, left : left + side])
            frame = av.VideoFrame.from_ndarray(square, format="rgb24")
            found.append(frame.reformat(SIDE, SIDE, interpolation="AREA").to_ndarray())
    return np.stack(found)


def dissolved(one: np.ndarray, other: np.ndarray, mixed: int, around: int = AROUND) -> np.ndarray:
    """`around` pixel frames of one clip, `mixed` of both while both run on, `around` of the other."""
    count = mixed + 2 * around
    share = (np.arange(count) - around + 1) / (mixed + 1)
    weight = share.clip(0, 1).astype(np.float32)[:, None, None, None]
    return (one[:count] * (1 - weight) + other[-count:] * weight).round().astype(np.uint8)


def encode(pictures: np.ndarray, path: Path) -> Path:
    """As videos are: H.264 with crf 23."""
    frames = [av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p") for picture in pictures]
    write_frames(path, frames, "libx264", Fraction(25), {"crf": "23", "preset": "medium"})
    return path


def found_whole(one: np.ndarray, other: np.ndarray, mixed: int, path: Path, around: int = AROUND) -> bool:
    """Whether every mixed pixel frame lies in scenes that are dissolves, and not many others do."""
    parts = find_scenes(encode(dissolved(one, other, mixed, around), path)).parts
    inside = {k for scene in parts if scene.dissolve for k in range(scene.start, scene.stop)}
    return inside >= set(range(around, around + mixed)) and len(inside) <= mixed + BEYOND


@pytest.fixture(scope="module")
def people(clips_dir: Path) -> dict[str, np.ndarray]:
    names = ("may_5s", "man_map_5s", "lieu_60s", "woman_glasses_5s")
    return {name: squares(clips_dir / "video" / f"{name}.mp4") for name in names}


@pytest.mark.parametrize("mixed", LENGTHS)
def test_dissolves_between_any_two_of_four_people(people: dict[str, np.ndarray], mixed: int, tmp_path: Path) -> None:
    pairs = [(one, other) for one in people for other in people if one != other]
    missed = [
        (one, other)
        for one, other in pairs
        if not found_whole(people[one], people[other], mixed, tmp_path / "a.mp4", around=35)
    ]
    assert not missed


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mixed", LENGTHS)
def test_dissolves_between_any_two_clips(mixed: int, sample_dir: Path, clips_dir: Path, tmp_path: Path) -> None:
    """Of the real clips, and of each rendered one with a third of those."""
    real = {path.stem: squares(path, 80) for path in sorted((clips_dir / "video").iterdir())}
    drawn = {path.stem: squares(path, 80) for path in sorted(sample_dir.glob("*.mp4"))}
    pairs = [(one, other) for one in real for other in real if one != other]
    pairs += [(one, other) for n, one in enumerate(drawn) for other in list(real)[n % 3 :: 3]]
    clips = real | drawn
    missed = [pair for pair in pairs if not found_whole(clips[pair[0]], clips[pair[1]], mixed, tmp_path / "a.mp4")]
    print(f"\n{mixed} pixel frames: {len(pairs) - len(missed)} of {len(pairs)} found whole; missed: {missed}")
    assert len(missed) <= 0.1 * len(pairs)


def test_no_window_shows_two_shots(clips_dir: Path, tmp_path: Path) -> None:
    one, other = (squares(clips_dir / "video" / f"{name}.mp4", 270) for name in ("german_anchor_20s", "lieu_60s"))
    scenes = find_scenes(encode(dissolved(one, other, 25, 120), tmp_path / "a.mp4")).parts
    seen = [(window.start, window.start + window.length) for window in plan_windows(scenes)]
    assert len(seen) == 2
    assert all(stop <= 120 or start >= 145 for start, stop in seen), seen


@pytest.mark.slow
def test_a_third_of_what_is_asked_for_at_most_in_uncut_clips(
    sample_dir: Path, clips_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The margin: blocks of 64 that behave as in a dissolve, in any span of any clip."""
    shares: list[float] = []
    whole = dissolves._share
    monkeypatch.setattr(dissolves, "_share", lambda span: shares.append(whole(span)) or shares[-1])
    for path in [*sorted(sample_dir.glob("*.mp4")), *sorted((clips_dir / "video").iterdir())]:
        shares.clear()
        seen = Dissolves()
        for _, picture in iter_frames(path, max_side=256):
            seen.add(picture)
        print(f"{path.stem}: {64 * max(shares):.0f}")
        assert not seen.parts() and 3 * max(shares) <= SURE, path.name


@pytest.mark.parametrize("mixed", LENGTHS)
@pytest.mark.parametrize("name", ["lieu_60s", "woman_glasses_5s"])
def test_light_that_changes_is_no_dissolve(people: dict[str, np.ndarray], name: str, mixed: int) -> None:
    """To 0.4 of it."""
    shot = people[name][: mixed + 2 * AROUND]
    light = 1 - 0.6 * ((np.arange(len(shot)) - AROUND) / mixed).clip(0, 1)
    seen = Dissolves()
    for picture in (shot * light[:, None, None, None]).astype(np.uint8):
        seen.add(picture)
    assert not seen.parts()


def test_a_caption_that_fades_in_is_no_dissolve(people: dict[str, np.ndarray]) -> None:
    """Over a quarter of the picture."""
    shot = people["man_map_5s"][:60].copy()
    card = people["lieu_60s"][0, :40]
    for place, picture in enumerate(shot):
        share = min(max((place - 20) / 13, 0), 1)
        picture[-40:] = (picture[-40:] * (1 - share) + card * share).astype(np.uint8)
    seen = Dissolves()
    for picture in shot:
        seen.add(picture)
    assert not seen.parts()


def test_a_fade_into_a_plain_picture_is_no_dissolve(people: dict[str, np.ndarray]) -> None:
    """Into one with a tenth of the contrast."""
    plain = 128 + 0.1 * (people["lieu_60s"].astype(np.float32) - 128)
    seen = Dissolves()
    for picture in dissolved(people["may_5s"], plain, 13):
        seen.add(picture)
    assert not seen.parts()


def test_a_span_of_one_shot_counts_for_nothing(people: dict[str, np.ndarray]) -> None:
    """All its blocks go straight from light to dark."""
    shot = people["lieu_60s"][0]
    span = [dissolves._blocks((shot * (1 - 0.06 * step)).astype(np.uint8)) for step in range(11)]
    assert dissolves._share(span) == 0


@pytest.mark.parametrize(
    ("shares", "parts"),
    [
        pytest.param([0, 0, 0, 5, 0, 12, 0, 4, 3, *[0] * 8, 8], [(3, 14)], id="on both sides"),
        pytest.param([*[5] * 10, 12, *[5] * 20], [(4, 23)], id="not those beside them"),
        pytest.param([12, 0, 0, 0, 12, *[5] * 20], [(0, 17)], id="sure ones in a row"),
        pytest.param([12, *[5] * 9, 12], [(0, 17)], id="in between"),
        pytest.param([5] * 30, [], id="none is sure"),
    ],
)
def test_less_sure_spans_count_beside_a_sure_one(
    shares: list[int], parts: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares of the spans of 6 pixel frames that end at each picture, as 64ths: span k is of pictures k to k + 6."""
    rest = iter([*shares, 0, 0])
    monkeypatch.setattr(dissolves, "SPANS", (6,))
    monkeypatch.setattr(dissolves, "_share", lambda span: next(rest) / 64)
    monkeypatch.setattr(dissolves, "_is_of_two_shots", lambda span: True)
    seen = Dissolves()
    for _ in range(6 + len(shares)):
        seen.add(np.zeros((8, 8, 3), np.uint8))
    assert seen.parts() == parts


def test_nothing_is_seen_across_black(people: dict[str, np.ndarray]) -> None:
    mixed = dissolved(people["may_5s"], people["man_map_5s"], 13)
    plain, broken = Dissolves(), Dissolves()
    for place, picture in enumerate(mixed):
        plain.add(picture)
        if place in (AROUND + 3, AROUND + 7):
            broken.add_black()
        else:
            broken.add(picture)
    assert len(plain.parts()) == 1 and not broken.parts()


def test_dissolves_are_scenes_shorter_than_a_window() -> None:
    assert windows.LENGTH > PIECE
    assert _parts({20, 95, 300}, [(10, 190)], 400) == (
        Scene(0, 0, 10), Scene(1, 10, 90, True), Scene(2, 90, 170, True), Scene(3, 170, 190, True),
        Scene(4, 190, 300), Scene(5, 300, 400),
    )  # fmt: skip
    assert _parts(set(), [(0, 30), (370, 400)], 400) == (
        Scene(0, 0, 30, True), Scene(1, 30, 370), Scene(2, 370, 400, True),
    )  # fmt: skip
    assert str(Scene(2, 370, 400, True)) == "scene 2 (pixel frames 370 to 399, a dissolve)"
