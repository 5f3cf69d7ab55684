"""The one build of the real clips that all tests share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.clips import copy_head

from dualforce.preprocess.build import BuildOptions, BuildReport, build_shards

HEAD_SECONDS = 7.0  # two windows; longer clips are cut to it, packets copied as they are, to keep the suite short


@pytest.fixture(scope="session")
def real_report(
    clips_dir: Path, landmarker_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[BuildReport, Path, list[str]]:
    """Shards of every real clip: the report, the folder, and the file names that the manifest calls usable."""
    usable = [Path(name).name for name in json.loads((clips_dir / "MANIFEST.json").read_text())["usable_for_training"]]
    folder = tmp_path_factory.mktemp("real")
    (folder / "clips").mkdir()
    for clip in sorted((clips_dir / "video").iterdir()):
        copy_head(clip, folder / "clips" / clip.name, HEAD_SECONDS)
    options = BuildOptions(face_landmarker=landmarker_file, workers=2)
    return build_shards(folder / "clips", folder / "shards", options), folder / "shards", usable
