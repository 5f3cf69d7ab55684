"""Inputs on the latent clock, and a real picture through the face landmark model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.face_models import FaceModels
from helpers.model_folder import run_config
from helpers.random_model import random_model
from hypothesis import given
from hypothesis import strategies as st

from dualforce.codecs.media import read_image
from dualforce.codecs.motion_landmarker import CROP_SIZE, TAG, LandmarkerMotion
from dualforce.codecs.motion_liveportrait import LivePortraitMotion
from dualforce.codecs.protocols import CodecError, Pixels, Wave
from dualforce.data.windows import audio_windows
from dualforce.generate import inputs as module
from dualforce.generate.inputs import GenerateError, Sources, prepare, whole_frames
from dualforce.types import FrameSpan, audio_frames_of, pixel_frames

WIDTH = 80


@given(st.integers(1, 500), st.integers(1, 6))
def test_whole_frames_is_the_shortest_that_fits(pixels: int, chunk: int) -> None:
    frames = whole_frames(pixels, chunk)
    assert (frames - 1) % chunk == 0 and pixel_frames(frames) >= pixels
    assert frames == 1 or pixel_frames(frames - chunk) < pixels


@pytest.mark.parametrize(("latents", "context"), [(1, 2), (5, 2), (9, 0), (4, 4)])
def test_audio_windows_are_those_of_training(latents: int, context: int) -> None:
    pixels = pixel_frames(latents)

    class Counted:
        """Feature frame i is the number i, so that a window shows which frames it holds."""

        def encode(self, wave: Wave) -> torch.Tensor:
            return torch.arange(2.0 * len(wave) / module.SAMPLES_PER_FRAME)[:, None]

    found = module._audio(np.zeros(pixels * module.SAMPLES_PER_FRAME, np.float32), Counted(), latents, context)
    slots = torch.arange(2.0 * pixels)[audio_frames_of(FrameSpan(0, latents))][..., None]
    assert torch.equal(found, audio_windows(slots, latents, context))


def real_config(size: int, width: int) -> tuple[Any, Any]:
    model = random_model(width, WIDTH)
    return model.config, run_config(model, size, TAG)


@pytest.fixture
def sources(clips_dir: Path, landmarker_file: Path) -> Sources:
    return Sources(
        clips_dir / "image" / "hallo_2.jpg", clips_dir / "audio" / "real3dportrait_Obama_5s.wav",
        face_landmarker=landmarker_file, seconds=1.0,
    )  # fmt: skip


def test_real_picture_is_cropped_to_the_face_and_has_motion(sources: Sources) -> None:
    model, config = real_config(128, LandmarkerMotion.width)
    prepared = prepare(sources, config, model, "config.json")
    assert prepared.pixel_frames == 25 and len(prepared.wave) == 16_000
    made = prepared.inputs
    assert made.reference.shape == (16, 16, 16) and made.audio.shape == (7, 12, WIDTH) and made.struct is None
    assert made.first_motion.shape == (4, LandmarkerMotion.width)
    assert torch.equal(made.first_motion[0], made.first_motion[3]) and made.first_motion.abs().max() > 0
    for tensor in (made.reference, made.audio, made.first_motion):
        assert torch.isfinite(tensor).all() and tensor.std() > 0


def test_motion_is_read_from_a_crop_of_the_size_that_training_used(
    sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the edge of the model's own pictures, 128, blendshapes are mostly error."""
    seen = []

    class Recorder(LandmarkerMotion):
        def encode(self, pixels: Pixels, fps: float) -> torch.Tensor:
            seen.append(pixels.shape)
            return super().encode(pixels, fps)

    monkeypatch.setattr(module, "motion_encoder", lambda tag, path, extractor, device: Recorder(path))
    model, config = real_config(128, LandmarkerMotion.width)
    prepare(sources, config, model, "config.json")
    assert seen == [(1, CROP_SIZE, CROP_SIZE, 3)]


def test_liveportrait_motion_of_the_picture(sources: Sources, face_models: FaceModels) -> None:
    """By the checkpoint of the model's tag, from the crop that the shard builder reads motion from."""
    encoder = LivePortraitMotion(face_models.liveportrait)
    model = random_model(encoder.width, WIDTH)
    config = run_config(model, 128, encoder.tag)
    with pytest.raises(CodecError, match=f"{encoder.tag}.*needs --motion-extractor FILE"):
        prepare(sources, config, model.config, "config.json")
    given = replace(sources, motion_extractor=face_models.liveportrait)
    found = prepare(given, config, model.config, "config.json")
    crop = module._face(sources.image, 128, sources.face_landmarker)(CROP_SIZE)
    wanted = found.statistics.normalise_struct(encoder.encode(crop[None], 25))
    assert torch.allclose(found.inputs.first_motion, wanted.expand(4, -1), rtol=1e-4, atol=1e-4)


def test_face_takes_about_half_of_the_crop(sources: Sources) -> None:
    from dualforce.codecs.face_landmarker import FaceLandmarkerModel

    assert sources.face_landmarker is not None
    crop = module._face(sources.image, 256, sources.face_landmarker)(256)
    assert crop.shape == (256, 256, 3) and read_image(sources.image).shape != crop.shape
    with FaceLandmarkerModel(sources.face_landmarker, video=False) as landmarker:
        box = landmarker.faces(crop)[0].box
    assert 0.42 < max(box[2:] - box[:2]) / 256 < 0.58
    assert box[0] > 20 and box[1] > 20 and box[2] < 236 and box[3] < 236


def test_picture_without_a_face_is_refused(sources: Sources, tmp_path: Path) -> None:
    (tmp_path / "grey.ppm").write_bytes(b"P6 200 160 255\n" + bytes([128]) * (200 * 160 * 3))
    model, config = real_config(128, LandmarkerMotion.width)
    with pytest.raises(GenerateError, match=r"grey\.ppm: no face found"):
        prepare(replace(sources, image=tmp_path / "grey.ppm"), config, model, "config.json")


def test_config_that_contradicts_itself_is_named(sources: Sources) -> None:
    model, config = real_config(128, LandmarkerMotion.width)
    geometry = config["geometry"] | {"latent": [16, 8, 8]}
    with pytest.raises(GenerateError, match=r"geometry\.latent = \[16, 8, 8\]: expected \[16, 16, 16\]"):
        prepare(sources, config | {"geometry": geometry}, model, "config.json")


def test_pictures_of_every_size_that_was_trained_at(sources: Sources) -> None:
    model, config = real_config(128, LandmarkerMotion.width)
    sizes = [{"pixel_size": 128, "frames": 9}, {"pixel_size": 192, "frames": 5}]
    config = config | {"geometry": config["geometry"] | {"buckets": sizes}}
    for size, edge in ((None, 16), (128, 16), (192, 24)):
        found = prepare(replace(sources, size=size), config, model, "config.json")
        assert found.inputs.reference.shape == (16, edge, edge)
    with pytest.raises(GenerateError, match=r"--size 160: expected 128 or 192, what config\.json says"):
        prepare(replace(sources, size=160), config, model, "config.json")
    alone = real_config(128, LandmarkerMotion.width)[1]
    with pytest.raises(GenerateError, match=r"--size 192: expected 128, what"):
        prepare(replace(sources, size=192), alone, model, "config.json")


@pytest.mark.parametrize("buckets", [[{"pixel_size": 128}], [7], 7, {"a": 1}])
def test_buckets_of_a_config_that_are_none(sources: Sources, buckets: object) -> None:
    model, config = real_config(128, LandmarkerMotion.width)
    config = config | {"geometry": config["geometry"] | {"buckets": buckets}}
    with pytest.raises(GenerateError, match=r"config\.json: geometry\.buckets: .*expected"):
        prepare(sources, config, model, "config.json")
