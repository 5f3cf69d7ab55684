"""What becomes of real clips that were spoilt in a known way: blurred, too loud, turned away, another face beside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from av.filter import Graph
from helpers.clips import sidecar_json, textured, tone, write_sidecar

from dualforce.codecs.media import iter_frames, probe, read_sound, write_video
from dualforce.preprocess.job import Job, Outcome
from dualforce.preprocess.process import process_video
from dualforce.preprocess.quality import UNJUDGED, Limits
from dualforce.preprocess.sample_file import load_sample

FRAMES = 85
OTHERS = (
    "german_anchor_20s", "man_interview_6s", "man_map_5s", "man_sofa_portrait1080_20s", "lieu_60s", "man_bald_15s",
    "woman_glasses_5s",
)  # fmt: skip


def run(video: Path, landmarker: Path | None, scratch: Path, limits: Limits | None = None) -> Outcome:
    sidecar = None if landmarker else video.with_suffix(".json")
    scratch.mkdir(exist_ok=True)
    return process_video(
        Job(video, video.name, video.stem, "who", "", 0, 64, limits or Limits(), sidecar, landmarker, scratch)
    )


def reasons(outcome: Outcome) -> list[str]:
    return [entry["reason"] for entry in outcome.rejected]


def rewritten(
    source: Path,
    target: Path,
    picture: Callable[[np.ndarray], np.ndarray] = lambda picture: picture,
    sound: Callable[[np.ndarray], np.ndarray] = lambda wave: wave,
) -> Path:
    """The first FRAMES pixel frames of a clip and their sound, changed."""
    placed = read_sound(source, probe(source).zero)
    assert placed is not None
    changed = (picture(original) for index, original in iter_frames(source) if index < FRAMES)
    even = (new[: new.shape[0] // 2 * 2, : new.shape[1] // 2 * 2] for new in changed)
    write_video(target, even, sound(placed.wave[: FRAMES * 640 + 640]))
    return target


def gaussian(sigma: float) -> Callable[[np.ndarray], np.ndarray]:
    def blur(picture: np.ndarray) -> np.ndarray:
        graph = Graph()
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=1)
        filters = [source, graph.add("format", "gbrp"), graph.add("gblur", f"sigma={sigma}:steps=3")]
        graph.link_nodes(*filters, graph.add("buffersink")).configure()
        graph.push(frame)
        return graph.pull().to_ndarray(format="rgb24")

    return blur


@pytest.mark.parametrize("name", ["may_5s", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_a_blurred_clip_is_rejected(name: str, clips_dir: Path, landmarker_file: Path, tmp_path: Path) -> None:
    """Sigma 4 pixels of the source. The clip itself, written again by the same encoder, is used."""
    source = clips_dir / "video" / f"{name}.mp4"
    same = run(rewritten(source, tmp_path / "same.mp4"), landmarker_file, tmp_path / "s")
    assert len(same.samples) == 1 and not same.rejected
    blurred = run(rewritten(source, tmp_path / "blurred.mp4", gaussian(4.0)), landmarker_file, tmp_path / "b")
    assert not blurred.samples and reasons(blurred) == ["R_BLUR"]
    sharp = load_sample(same.samples[0]).meta["checks"]["sharpness"]
    soft = float(blurred.rejected[0]["detail"].split()[1])
    print(f"\n{name}: sharpness {sharp:.2f}, blurred {soft:.2f}")
    assert soft < 0.42 and sharp > 0.7  # the limit is 0.5


def test_a_turned_head_is_rejected(clips_dir: Path, landmarker_file: Path, tmp_path: Path) -> None:
    """This man looks 9 to 16 degrees to the side throughout."""
    clip = clips_dir / "video" / "man_interview_6s.mp4"
    outcome = run(clip, landmarker_file, tmp_path / "s", replace(Limits(), yaw_degrees=8.0))
    assert not outcome.samples and reasons(outcome) == ["R_YAW"]
    detail = outcome.rejected[0]["detail"]
    assert detail.startswith("head turned by more than 8 degrees in ") and "up to 16" in detail


def test_a_real_voice_that_is_cut_off(clips_dir: Path, landmarker_file: Path, tmp_path: Path) -> None:
    clip = clips_dir / "video" / "may_5s.mp4"
    loud = rewritten(clip, tmp_path / "loud.mp4", sound=lambda wave: (wave * 60).clip(-1, 1))
    assert reasons(run(loud, landmarker_file, tmp_path / "s")) == ["R_CLIPPED"]


def test_a_face_without_a_voice(clips_dir: Path, landmarker_file: Path, tmp_path: Path) -> None:
    clip = clips_dir / "video" / "may_5s.mp4"
    rng = np.random.default_rng(0)
    noisy = rewritten(clip, tmp_path / "n.mp4", sound=lambda wave: rng.normal(0, 0.1, len(wave)).astype(np.float32))
    outcome = run(noisy, landmarker_file, tmp_path / "s")
    assert reasons(outcome) == ["R_NOSPEECH"]
    assert outcome.rejected[0]["detail"].endswith("expected at least 50%")


def test_two_people_in_one_picture(clips_dir: Path, landmarker_file: Path, tmp_path: Path) -> None:
    others = (picture for _, picture in iter_frames(clips_dir / "video" / "german_anchor_20s.mp4"))
    both = rewritten(
        clips_dir / "video" / "may_5s.mp4",
        tmp_path / "two.mp4",
        lambda picture: np.concatenate([picture, next(others)], axis=1),
    )
    assert reasons(run(both, landmarker_file, tmp_path / "s")) == ["R_MULTIFACE"]


@pytest.mark.slow
def test_two_real_people_one_after_the_other(clips_dir: Path, landmarker_file: Path, tmp_path: Path) -> None:
    """Both at the same place: no face jumps, and still no window holds both."""
    first = [p for k, p in iter_frames(clips_dir / "video" / "may_5s.mp4") if k < FRAMES]
    second = [p for k, p in iter_frames(clips_dir / "video" / "german_anchor_20s.mp4") if k < FRAMES]
    voice = read_sound(clips_dir / "video" / "german_anchor_20s.mp4")
    assert voice is not None
    write_video(tmp_path / "cut.mp4", first[:40] + second + first, voice.wave[: (40 + 2 * FRAMES + 1) * 640])
    outcome = run(tmp_path / "cut.mp4", landmarker_file, tmp_path / "s")
    metas = [load_sample(stem).meta for stem in outcome.samples]
    assert [(meta["scene"]["index"], meta["first_pixel_frame"]) for meta in metas] == [(1, 40), (2, 40 + FRAMES)]
    assert reasons(outcome) == ["R_SHORT"] and outcome.rejected[0]["scene"] == 0


def test_rendered_clips_are_judged_when_asked_for(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", textured(FRAMES), tone(FRAMES + 1))
    write_sidecar(tmp_path / "a.mp4", sidecar_json(FRAMES))
    used = run(tmp_path / "a.mp4", None, tmp_path / "s")
    meta = load_sample(used.samples[0]).meta
    assert meta["not_judged"] == list(UNJUDGED) and meta["checks"]["speech_share"] < 0.5
    assert "sharpness" not in meta["checks"] and "yaw_degrees" not in meta["checks"]
    judged = Limits(judge_rendered=True)
    assert reasons(run(tmp_path / "a.mp4", None, tmp_path / "s", judged)) == ["R_NOSPEECH"]
    assert reasons(run(tmp_path / "a.mp4", None, tmp_path / "s", replace(judged, speech_share=0.0))) == ["R_BLUR"]
    last = run(tmp_path / "a.mp4", None, tmp_path / "s", replace(judged, speech_share=0.0, sharpness=0.0))
    assert load_sample(last.samples[0]).meta["not_judged"] == ["yaw_rate"]
