"""Fixtures for the whole suite: where real material lies. What is absent is a skip with a reason, never a pass."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.face_models import FaceModels, write_face_models

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def clips_dir() -> Path:
    """Folder of the real clips: MANIFEST.json, video/, audio/, image/. DUALFORCE_CLIPS names another place."""
    folder = Path(os.environ.get("DUALFORCE_CLIPS") or SHARED / "clips")
    if not (folder / "MANIFEST.json").is_file():
        pytest.skip(f"real clips are absent: no {folder / 'MANIFEST.json'} (set DUALFORCE_CLIPS)")
    return folder


@pytest.fixture(scope="session")
def landmarker_file() -> Path:
    """MediaPipe's face-landmark model. DUALFORCE_FACE_LANDMARKER names another place."""
    path = Path(os.environ.get("DUALFORCE_FACE_LANDMARKER") or SHARED / "models" / "face_landmarker.task")
    if not path.is_file():
        pytest.skip(f"the face-landmark model is absent: no {path} (set DUALFORCE_FACE_LANDMARKER)")
    return path


@pytest.fixture(scope="session")
def whisper_folder() -> Path:
    """The encoder of Whisper tiny.en as transformers writes it. DUALFORCE_WHISPER names another place."""
    folder = Path(os.environ.get("DUALFORCE_WHISPER") or SHARED / "models" / "whisper-tiny-en-encoder")
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"the Whisper encoder is absent: no {folder / 'model.safetensors'} (set DUALFORCE_WHISPER)")
    return folder


@pytest.fixture(scope="session")
def sample_dir() -> Path:
    """Folder of the bundled rendered clips; they belong to the checkout, so their absence is a failure."""
    folder = ROOT / "data_shards" / "sample"
    assert any(folder.glob("*.mp4")), f"{folder}: no clips"
    return folder


@pytest.fixture(scope="session")
def face_models(tmp_path_factory: pytest.TempPathFactory) -> FaceModels:
    """Checkpoints of LivePortrait, DECA and EMOCA in the published layout, with random weights."""
    return write_face_models(tmp_path_factory.mktemp("face-models"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: one thread is faster than two, and by far when other processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test that draws from the global generator draws the same in every run."""
    torch.manual_seed(0)
