"""Building with LivePortrait's motion and DECA's FLAME (random weights): streams, clock, tags, what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.clips import copy_head, sidecar_json, textured, tone, write_sidecar
from helpers.face_models import FaceModels

from data_shards.check import find_faults
from data_shards.reader import ShardSet
from data_shards.schema import ClipSample
from dualforce.codecs.face_box import square_crop
from dualforce.codecs.face_landmarker import FaceLandmarkerModel
from dualforce.codecs.flame_deca import DecaFlame
from dualforce.codecs.media import read_audio, read_video, write_video
from dualforce.codecs.motion_liveportrait import LivePortraitMotion
from dualforce.codecs.protocols import CodecError, Flame, Pixels
from dualforce.data.collate import collate
from dualforce.data.order import ClipRef
from dualforce.data.statistics import StreamStatistics
from dualforce.preprocess import build, process, quality, windows
from dualforce.preprocess.build import BuildError, BuildOptions, build_shards
from dualforce.preprocess.features import check_faces_seen, flame_parameters
from dualforce.preprocess.job import Job
from dualforce.preprocess.process import process_video
from dualforce.preprocess.quality import Limits
from dualforce.preprocess.reasons import Reason, Rejected
from dualforce.preprocess.window_faces import boxes_in_crops

SHORT = Limits(seconds=0.2, speech_share=0)
WINDOW = 5  # pixel frames, two latent ones: the networks take a tenth of a second and more a picture on a CPU
CLIP = "man_interview_6s.mp4"


@pytest.fixture(scope="module", autouse=True)
def _short_windows() -> Iterator[None]:
    """Of WINDOW pixel frames, and builds in this process, where that holds."""

    def in_turn(tasks: Sequence[Any], work: Any, devices: Sequence[str], prepare: Any) -> Iterator[Any]:
        kept = prepare(devices[0])
        return ((task, work(task, kept)) for task in tasks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "LENGTH", WINDOW)
        patch.setattr(process, "plan_windows", partial(windows.plan_windows, length=WINDOW))
        patch.setattr(build, "run_tasks", in_turn)
        yield


@pytest.fixture(scope="module")
def real(
    clips_dir: Path, landmarker_file: Path, face_models: FaceModels, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ShardSet, Path, ClipSample]:
    """One window of a real clip, with both networks."""
    folder = tmp_path_factory.mktemp("face-build")
    (folder / "clips").mkdir()
    copy_head(clips_dir / "video" / CLIP, folder / "clips" / CLIP, 0.3)
    options = BuildOptions(
        size=64, face_landmarker=landmarker_file, motion_extractor=face_models.liveportrait,
        flame_encoder=face_models.emoca, limits=SHORT,
    )  # fmt: skip
    build_shards(folder / "clips", folder / "shards", options)
    shards = ShardSet.open(folder / "shards")
    return shards, folder / "clips" / CLIP, shards.split("train").read(0)


def test_tags_and_widths(real: tuple[ShardSet, Path, ClipSample], face_models: FaceModels) -> None:
    shards, _, sample = real
    extractors = shards.manifest["extractors"]
    motion, flame = LivePortraitMotion(face_models.liveportrait), DecaFlame(face_models.emoca)
    assert extractors["motion"] == {"tag": motion.tag, "width": 70, "names": list(motion.names)}
    assert extractors["flame"] == {"tag": flame.tag, "width": 56, "names": list(flame.names)}
    assert sample.meta["tags"] == {stream: entry["tag"] for stream, entry in extractors.items()}
    assert sample.meta["checks"]["flame_valid"] == 1
    assert not find_faults(shards.root, samples=True).faults


def test_streams_are_those_of_the_networks_on_the_crops(
    real: tuple[ShardSet, Path, ClipSample], face_models: FaceModels, landmarker_file: Path
) -> None:
    """Pixel frame by pixel frame, from the crop boxes of the record: latent frame j holds pixel frames 4j-3 to 4j."""
    _, video, sample = real
    assert sample.flame is not None and sample.flame_valid is not None
    assert sample.struct.shape == (2, 4, 70) and sample.flame.shape == (2, 4, 56)
    assert sample.flame_valid.shape == (2, 4) and sample.flame_valid.all()
    frames = read_video(video, stop=5).frames
    motion = LivePortraitMotion(face_models.liveportrait)
    for pixel in (0, 3):
        x0, y0, x1, y1 = sample.meta["crop"]["boxes"][pixel]
        crop = square_crop(frames[pixel], np.array([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0]), 256)
        slot = (-(-pixel // 4), (pixel - 1) % 4 if pixel else 0)
        # Boxes are rounded to a tenth of a pixel; other pixel frames differ by far more.
        error = (motion.encode(crop[None], 25)[0] - sample.struct[slot]).abs()
        moved = (sample.struct[slot] - sample.struct[(0, 0) if pixel else (1, 3)]).abs()
        assert error.mean() < 0.3 * moved.mean(), pixel
    assert (sample.struct[0] == sample.struct[0, :1]).all() and (sample.flame[0] == sample.flame[0, :1]).all()
    for stream in (sample.struct, sample.flame):
        assert (stream[1, 1:] - stream[1, :-1]).abs().amax(dim=-1).gt(0).all()


def test_training_data_takes_the_set(real: tuple[ShardSet, Path, ClipSample]) -> None:
    shards, _, sample = real
    statistics = StreamStatistics.from_manifest(shards.manifest)
    batch = collate([sample], [ClipRef(0, 0, 0)], statistics, frames=2, context=2, text_dim=4)
    assert batch.flame.shape == (1, 2, 4, 56) and batch.flame_valid.all() and batch.struct.shape == (1, 2, 4, 70)
    assert sample.flame is not None and torch.equal(batch.flame[0], statistics.normalise_flame(sample.flame))


def rendered(folder: Path) -> Path:
    path = folder / "a.mp4"
    path.parent.mkdir()
    write_video(path, textured(5), tone(7))
    write_sidecar(path, sidecar_json(5))
    return path


def test_flame_beside_a_sidecars_motion(tmp_path: Path, face_models: FaceModels) -> None:
    """Motion is the sidecar's; FLAME is read at the face boxes that it gives."""
    video = rendered(tmp_path / "clips")
    options = BuildOptions(size=160, flame_encoder=face_models.deca, limits=SHORT)
    manifest = build_shards(tmp_path / "clips", tmp_path / "out", options).manifest
    assert manifest["extractors"]["motion"]["tag"] == "test-v1"
    assert manifest["extractors"]["flame"]["tag"].startswith("deca-56-")
    sample = ShardSet.open(tmp_path / "out").split("train").read(0)
    assert sample.flame is not None and sample.flame_valid is not None and sample.flame_valid.all()
    pictures = read_video(video).frames
    given = DecaFlame(face_models.deca).encode(pictures[[0, 4]], np.array([[40.0, 40, 110, 120]] * 2))
    found = sample.flame[[0, 1], [0, 3]]
    moved = (given.values[0] - given.values[1]).abs().mean()
    assert (found - given.values).abs().mean() < 0.3 * moved  # the crop is nearly the picture, resized


def test_boxes_in_crops() -> None:
    boxes = boxes_in_crops(
        np.array([[40.0, 40, 110, 120], [np.nan] * 4]), np.array([[80.0, 70, 160], [80, 70, 160]]), 320
    )
    assert boxes[0].tolist() == [80, 100, 220, 260] and np.isnan(boxes[1]).all()


def test_validity_is_on_the_latent_clock() -> None:
    class Numbered:
        """FLAME of pixel frame k is k + 1; frames without a box are invalid."""

        tag, width, names = "numbered-v1", 1, ("k",)

        def encode(self, pixels: Pixels, boxes: np.ndarray) -> Flame:
            valid = torch.from_numpy(np.isfinite(boxes).all(axis=1))
            return Flame(torch.where(valid, torch.arange(1.0, len(pixels) + 1), 0.0)[:, None], valid)

    boxes = np.zeros((9, 4))
    boxes[[0, 6]] = np.nan
    found = flame_parameters(Numbered(), np.zeros((9, 8, 8, 3), np.uint8), boxes)
    assert found.tag == "numbered-v1" and found.data.shape == (3, 4, 1)
    assert found.data[..., 0].tolist() == [[0, 0, 0, 0], [2, 3, 4, 5], [6, 0, 8, 9]]
    assert found.valid.tolist() == [[False] * 4, [True] * 4, [True, False, True, True]]


def test_a_window_with_a_missing_face_is_refused(
    clips_dir: Path, landmarker_file: Path, face_models: FaceModels, tmp_path: Path
) -> None:
    """The face is painted over in its pixel frame 3, between two that the face track looks at: the network would give
    numbers for it."""
    source = clips_dir / "video" / CLIP
    frames = read_video(source, stop=10).frames
    with FaceLandmarkerModel(landmarker_file, video=False) as landmarker:
        x0, y0, x1, y1 = landmarker.faces(frames[3])[0].box.round().astype(int)
    frames[3, y0:y1, x0:x1] = frames[3, y0:y1, x0:x1].mean(axis=(0, 1))
    (tmp_path / "clips").mkdir()
    write_video(tmp_path / "clips" / "a.mp4", frames, read_audio(source)[: 12 * 640])
    job = Job(
        video=tmp_path / "clips" / "a.mp4", source="a.mp4", key="a", identity="a", sha256="", bytes=1, size=64,
        limits=replace(SHORT, face_rate=0.5), sidecar=None, landmarker=landmarker_file, scratch=tmp_path,
        motion_extractor=face_models.liveportrait, motion_tag=LivePortraitMotion(face_models.liveportrait).tag,
    )  # fmt: skip
    outcome = process_video(job)
    assert [(e["reason"], e["window"]) for e in outcome.rejected] == [("R_NOFACE", 0)]
    assert "no face in pixel frame 3 of the window" in outcome.rejected[0]["detail"]
    assert [path.name for path in outcome.samples] == ["a-w0001"]
    # The checkpoints that the job finds are not those that the set was begun with.
    for changes in (
        {"motion_tag": "liveportrait-70-0-v1"},
        {"flame_encoder": face_models.deca, "flame_tag": "deca-56-0-v1"},
    ):
        (entry,) = process_video(replace(job, **changes)).rejected
        assert entry["reason"] == "E_INTERNAL" and "-0-v1'" in entry["detail"].partition("expected")[2], changes


def test_missing_faces_are_counted() -> None:
    check_faces_seen(np.zeros((3, 4)))
    boxes = np.zeros((5, 4))
    boxes[[1, 4]] = np.nan
    with pytest.raises(Rejected, match=r"no face in pixel frame 1 of the window \(2 such\)") as caught:
        check_faces_seen(boxes)
    assert caught.value.reason is Reason.R_NOFACE


def test_files_and_options_that_cannot_be_used(tmp_path: Path, face_models: FaceModels) -> None:
    rendered(tmp_path / "clips")
    wrong = BuildOptions(size=64, flame_encoder=face_models.liveportrait, limits=SHORT)
    with pytest.raises(CodecError, match="expected DECA's or EMOCA's"):
        build_shards(tmp_path / "clips", tmp_path / "out", wrong)
    twice = BuildOptions(size=64, motion_extractor=face_models.liveportrait, limits=SHORT)
    with pytest.raises(BuildError, match=r"--motion-extractor .*sidecars with motion of tag 'test-v1': expected one"):
        build_shards(tmp_path / "clips", tmp_path / "out", twice)
    (tmp_path / "clips" / "a.json").unlink()
    with pytest.raises(BuildError, match="--face-landmarker FILE"):
        build_shards(tmp_path / "clips", tmp_path / "out", twice)
    assert list((tmp_path / "out").iterdir()) == []
