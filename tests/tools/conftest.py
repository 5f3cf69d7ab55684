"""What the tests of the download tools share."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.numbered_clip import numbered_clip


@pytest.fixture(scope="session")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds; what the fake downloader brings."""
    return numbered_clip(tmp_path_factory.mktemp("film") / "film.mp4", 75)
