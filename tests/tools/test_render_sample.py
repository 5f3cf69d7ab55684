"""The rendered sample: the same every time, and its truth is what is seen and heard."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import typer
from numpy.typing import NDArray
from typer.testing import CliRunner

from dualforce.codecs.media import read_video
from dualforce.types import FPS, SAMPLE_RATE
from tools.render.clip import Clip, make_clip
from tools.render.geometry import HEAD_LIFT
from tools.render.identity import HAIR_STYLES, Identity, make_identity
from tools.render.motion import Pose
from tools.render.scene import Picture, draw, draw_background
from tools.render_sample import main, write_clip

SAMPLE = Path(__file__).parents[2] / "data_shards" / "sample"
STILL = Pose(0, 0, 0, 0, 0, 1, mouth_open=0.3, mouth_wide=0, blink=0, brow_raise=0)
PER_FRAME = SAMPLE_RATE // FPS


def picture(who: Identity, size: int = 96, /, **motion: float) -> Picture:
    return draw(who, STILL._replace(**motion), draw_background(who, size))


def centre(box: tuple[float, float, float, float]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def loudness(wave: NDArray[np.float32]) -> NDArray[np.float64]:
    """RMS of the sound during each pixel frame."""
    blocks = wave[: len(wave) // PER_FRAME * PER_FRAME].reshape(-1, PER_FRAME).astype(np.float64)
    return np.sqrt((blocks**2).mean(axis=1))


def correlation(opening: NDArray[np.float64], loud: NDArray[np.float64], lag: int) -> float:
    """Correlation of the opening at p with the loudness at p + lag."""
    span = range(max(0, -lag), min(len(opening), len(loud)) - max(0, lag))
    return float(np.corrcoef([opening[p] for p in span], [loud[p + lag] for p in span])[0, 1])


def peak_lag(clip: Clip) -> int:
    opening, loud = np.array([pose.mouth_open for pose in clip.motion]), loudness(clip.wave)
    return max(range(-12, 13), key=lambda lag: correlation(opening, loud, lag))


def test_same_options_give_same_pictures_sound_and_sidecar() -> None:
    clips = [make_clip(3, 1, 4, 48) for _ in range(2)]
    drawn = [list(clip.pictures()) for clip in clips]
    for first, second in zip(*drawn, strict=True):
        assert np.array_equal(first.pixels, second.pixels)
    assert np.array_equal(clips[0].wave, clips[1].wave)
    sidecars = [c.sidecar([p.face_box for p in d], [p.mouth_box for p in d]) for c, d in zip(clips, drawn, strict=True)]
    assert sidecars[0] == sidecars[1]
    other = make_clip(4, 1, 4, 48)
    assert not np.array_equal(other.wave, clips[0].wave)
    assert not np.array_equal(next(other.pictures()).pixels, drawn[0][0].pixels)


@pytest.mark.parametrize("index", [0, 5, 8])
def test_mouth_opens_as_far_as_the_truth_says(index: int) -> None:
    """In pixels (lower face changed against the closed mouth) and in the mouth box."""
    who = make_identity(0, index)
    openings = np.linspace(0.0, 1.0, 9)
    shots = [picture(who, mouth_open=float(o)) for o in openings]
    x0, _, x1, _ = (int(edge) for edge in shots[0].mouth_box)
    top, bottom = int(shots[-1].mouth_box[1]), int(shots[-1].mouth_box[3])
    closed = shots[0].pixels[top:bottom, x0:x1].astype(int)
    changed = [np.abs(s.pixels[top:bottom, x0:x1] - closed).max(axis=2).__gt__(24).sum() for s in shots]
    height = [s.mouth_box[3] - s.mouth_box[1] for s in shots]
    assert np.corrcoef(openings, changed)[0, 1] > 0.9
    assert np.corrcoef(openings, height)[0, 1] > 0.97
    assert height[-1] > 2 * height[0]


def test_mouth_box_follows_a_moving_clip() -> None:
    clip = make_clip(0, 2, 40, 96)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (p.mouth_box for p in clip.pictures())]
    area = [a / pose.scale**2 for a, pose in zip(areas, clip.motion, strict=True)]
    assert np.corrcoef(area, [pose.mouth_open for pose in clip.motion])[0, 1] > 0.9


@pytest.mark.parametrize("index", range(6))
def test_face_box_lies_on_the_person_and_holds_the_mouth(index: int) -> None:
    """What changes with the background is no person; one identity per hair style."""
    who = make_identity(0, index)
    pose = STILL._replace(yaw=12.0, tx=0.05)
    shots = [draw(who, pose, np.full((3, 192, 192), level, dtype=np.float32)) for level in (0.0, 1.0)]
    person = (shots[0].pixels == shots[1].pixels).all(axis=2)
    x0, y0, x1, y1 = shots[0].face_box
    assert 0.25 * 96 < y1 - y0 < 0.75 * 96 and 0.2 * 96 < x1 - x0 < 0.6 * 96
    at_y, at_x = (np.arange(96)[:, None] - (y0 + y1) / 2), (np.arange(96) - (x0 + x1) / 2)
    oval = np.hypot(at_y / (y1 - y0), at_x / (x1 - x0)) < 0.45  # a turned head's box has empty lower corners
    assert person[oval].mean() > 0.92
    assert person[np.roll(oval, int(x1 - x0) // 2, axis=1)].mean() < 0.85, "the measure must notice a shifted box"
    rows, columns = np.flatnonzero(person.any(axis=1)), np.flatnonzero(person[: int(y1)].any(axis=0))
    assert rows[0] <= y0 + 1 and columns[0] <= x0 + 1 and columns[-1] >= x1 - 2
    a0, b0, a1, b1 = shots[0].mouth_box
    assert x0 < a0 < a1 < x1 and (y0 + y1) / 2 < b0 < b1 < y1


@pytest.mark.parametrize(
    ("motion", "dx", "dy"),
    [({"yaw": 15.0}, 1, 0), ({"pitch": 8.0}, 0, -1), ({"roll": 8.0}, 1, 0), ({"tx": 0.1}, 1, 0), ({"ty": 0.1}, 0, -1)],
)
def test_head_moves_the_way_the_truth_says(motion: dict[str, float], dx: int, dy: int) -> None:
    """The mouth's box goes the right way, and the red of the lips with it."""
    who = make_identity(0, 8)
    shots = [picture(who), picture(who, **motion), picture(who, **{k: -v for k, v in motion.items()})]
    boxes, reds = [centre(s.mouth_box) for s in shots], [_reddest(s) for s in shots]
    for places in (boxes, reds):
        plus, minus = np.subtract(places[1], places[0]), np.subtract(places[2], places[0])
        assert plus @ (dx, dy) > 1.5 and minus @ (dx, dy) < -1.5
    if "tx" in motion:
        assert boxes[1][0] - boxes[0][0] == pytest.approx(0.1 * 96 / 2, abs=0.6)


def _reddest(shot: Picture) -> tuple[float, float]:
    """Mean place of the reddest pixels of the lower face."""
    x0, y0, x1, y1 = (int(edge) for edge in shot.face_box)
    middle = (y0 + y1) // 2
    low = shot.pixels[middle:y1, x0:x1].astype(float)
    red = low[..., 0] / (low.sum(axis=2) + 30)
    rows, columns = np.nonzero(red >= np.quantile(red, 0.96))
    return float(columns.mean()) + x0, float(rows.mean()) + middle


def test_scale_and_blink_are_seen() -> None:
    who = make_identity(0, 8)
    width = [b[2] - b[0] for b in (picture(who, scale=s).face_box for s in (0.8, 1.0, 1.2))]
    assert width[1] / width[0] == pytest.approx(1.25, abs=0.06) and width[2] / width[1] == pytest.approx(1.2, abs=0.06)
    box = picture(who).face_box
    eyes = slice(int(box[1]), int((box[1] + box[3]) / 2))
    white = [(picture(who, blink=b).pixels[eyes].min(axis=2) > 170).sum() for b in (0.0, 0.5, 1.0)]
    assert white[0] > white[1] > white[2] == 0


def test_parts_outside_the_picture_are_refused_and_the_edge_is_not() -> None:
    who = make_identity(0, 0)
    assert picture(who, ty=0.4).face_box[1] >= 0
    with pytest.raises(ValueError, match="nothing of the face"):
        picture(who, ty=2.0)  # all of the head is above the picture
    with pytest.raises(ValueError, match="nothing of the face"):
        picture(who, ty=-1.2 - HEAD_LIFT)  # hair and brow are seen, the mouth is not


@pytest.mark.parametrize("index", [0, 7, 15])
def test_loudness_is_the_mouth_opening(index: int) -> None:
    clip = make_clip(0, index, 200, 32)
    opening, loud = np.array([pose.mouth_open for pose in clip.motion]), loudness(clip.wave)
    assert len(clip.wave) == 200 * PER_FRAME and 0.1 < np.abs(clip.wave).max() < 1.0
    assert peak_lag(clip) == 0
    assert correlation(opening, loud, 0) > 0.97
    assert 0.05 < (opening < 0.02).mean() < 0.6, "a clip has pauses and speech"
    # silence is at least 30 dB below speech
    assert loud[opening < 0.002].mean() < 0.03 * loud[opening > 0.5].mean()


def test_voice_has_the_pitch_of_its_identity() -> None:
    for index in (1, 6):
        clip = make_clip(0, index, 250, 32)
        spectrum = np.abs(np.fft.rfft(clip.wave * np.hanning(len(clip.wave)))) ** 2
        power = np.fft.irfft(spectrum)  # autocorrelation
        lags = np.arange(SAMPLE_RATE // 400, SAMPLE_RATE // 70)
        heard = SAMPLE_RATE / lags[np.argmax(power[lags])]
        assert heard == pytest.approx(make_identity(0, index).pitch_hz, rel=0.1)


@pytest.mark.parametrize("offset", [0.2, -0.32])
def test_offset_shifts_the_sound_alone(offset: float) -> None:
    plain, moved = make_clip(0, 4, 150, 48), make_clip(0, 4, 150, 48, offset)
    shift = round(offset * SAMPLE_RATE)
    late, early = (moved.wave, plain.wave) if shift > 0 else (plain.wave, moved.wave)
    assert np.array_equal(late[abs(shift) :], early[: -abs(shift)])
    assert peak_lag(moved) == round(offset * FPS)
    assert moved.motion == plain.motion and moved.audio_offset_s == offset
    assert np.array_equal(next(moved.pictures()).pixels, next(plain.pictures()).pixels)
    assert np.abs(moved.wave[:PER_FRAME]).max() > 0 and np.abs(moved.wave[-PER_FRAME:]).max() > 0


def test_offset_beyond_the_margin_is_refused() -> None:
    with pytest.raises(ValueError, match=r"offset_s 2\.5"):
        make_clip(0, 0, 10, 32, 2.5)


def test_identities_differ_and_do_not_depend_on_how_many_there_are() -> None:
    people = [make_identity(0, index) for index in range(40)]
    assert len({who.name for who in people}) == 40
    assert {who.hair_style for who in people} == set(HAIR_STYLES)
    assert max(w.pitch_hz for w in people) > 2 * min(w.pitch_hz for w in people)
    looks = [np.array([*w.skin, *w.hair, *w.clothes, *w.background[0]]) for w in people]
    assert min(np.abs(a - b).max() for a, b in combinations(looks, 2)) > 0.08
    assert make_identity(0, 7) == people[7]
    assert make_identity(1, 7).name not in {who.name for who in people}
    shots = [picture(who, 48).pixels.astype(float) for who in people[:12]]
    assert min(np.abs(a - b).mean() for a, b in combinations(shots, 2)) > 8.0


def test_written_clip_holds_what_was_drawn(tmp_path: Path) -> None:
    clip = make_clip(0, 3, 30, 96)
    ticks: list[int] = []
    path = write_clip(clip, tmp_path, lambda: ticks.append(1))
    video = read_video(path)
    assert len(ticks) == len(video.frames) == 30 and video.sound is not None
    for drawn, read in zip(clip.pictures(), video.frames, strict=True):
        assert _psnr(drawn.pixels, read) > 30.0
    samples = min(len(video.sound.wave), len(clip.wave))
    assert samples >= 29 * PER_FRAME
    assert np.corrcoef(video.sound.wave[:samples], clip.wave[:samples])[0, 1] > 0.95  # so no coder delay either
    assert sorted(p.name for p in tmp_path.iterdir()) == ["id03.json", "id03.mp4"]


def _psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(10 * np.log10(255.0**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def test_bundled_sample_is_complete() -> None:
    sidecars = sorted(SAMPLE.glob("*.json"))
    assert [path.stem for path in sidecars] == [f"id{i:02d}" for i in range(20)]
    assert {path.stem for path in SAMPLE.glob("*.mp4")} == {path.stem for path in sidecars}
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) < 2e6
    assert "CC0" in (SAMPLE / "README.md").read_text(encoding="utf-8")
    for path in sidecars:
        truth = json.loads(path.read_text(encoding="utf-8"))
        assert (truth["format"], truth["version"], truth["fps"]) == ("dualforce-sidecar", 1, 25)
        assert truth["identity"] == path.stem and truth["licence"] == "CC0-1.0" and truth["audio_offset_s"] == 0.0
        assert truth["motion"]["tag"] == "rendered-head-v1" and truth["motion"]["names"] == list(Pose._fields)
        values = np.array(truth["motion"]["values"])
        assert values.shape == (85, len(Pose._fields)) and np.isfinite(values).all()
        for boxes in (np.array(truth["face_boxes"]), np.array(truth["mouth_boxes"])):
            assert boxes.shape == (85, 4) and boxes.min() >= 0 and boxes.max() <= 160
            assert (boxes[:, :2] < boxes[:, 2:]).all()


@pytest.mark.parametrize("index", [0, 19])
def test_bundled_clip_is_what_the_tool_draws_today(index: int) -> None:
    truth = json.loads((SAMPLE / f"id{index:02d}.json").read_text(encoding="utf-8"))
    video = read_video(SAMPLE / f"id{index:02d}.mp4")
    clip = make_clip(0, index, 85, 160)
    assert video.frames.shape == (85, 160, 160, 3) and video.sound is not None
    assert np.allclose([list(pose) for pose in clip.motion], truth["motion"]["values"], atol=2e-4)
    first = next(clip.pictures())
    assert _psnr(first.pixels, video.frames[0]) > 30.0
    assert np.allclose(first.face_box, truth["face_boxes"][0], atol=1.0)
    opening = np.array([pose.mouth_open for pose in clip.motion])
    loud = loudness(video.sound.wave)
    assert max(range(-8, 9), key=lambda lag: correlation(opening, loud, lag)) == 0
    assert correlation(opening, loud, 0) > 0.95


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--identities", "0"], "--identities 0"),
        (["--seconds", "nan"], "--seconds nan"),
        (["--seconds", "0.001"], "--seconds 0.001"),
        (["--size", "97"], "--size 97"),
        (["--size", "8"], "--size 8"),
        (["--seed", "-1"], "--seed -1"),
        (["--offset", "9"], "--offset 9"),
    ],
)
def test_bad_option_is_one_line_and_nothing_is_written(options: list[str], named: str, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "clips"), *options])
    assert result.exit_code == 2
    assert named in result.output and "expected" in result.output and len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "clips").exists()


def test_command_writes_the_clips_asked_for(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    options = ["--identities", "2", "--seconds", "0.2", "--size", "48", "--seed", "5", "--offset", "0.1"]
    result = CliRunner().invoke(app, ["--out", str(tmp_path), *options])
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"s5-id0{i}.{e}" for i in range(2) for e in ("json", "mp4")]
    truth = json.loads((tmp_path / "s5-id01.json").read_text(encoding="utf-8"))
    assert truth["audio_offset_s"] == 0.1 and len(truth["motion"]["values"]) == 5
