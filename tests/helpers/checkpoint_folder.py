"""A checkpoint folder without DeepSpeed's files: what the project itself writes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from dualforce.train.checkpoint import SavedState
from dualforce.train.manifest import FileSum, sum_of, write_manifest


def write_checkpoint(run: Path, state: SavedState) -> Path:
    """RUN/checkpoints with the one checkpoint `state`, complete; returns its folder."""
    folder = run / "checkpoints" / f"step-{state.step:06d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps(asdict(state)))
    seal(folder)
    (run / "checkpoints" / "LATEST").write_text(folder.name + "\n")
    return folder


def seal(folder: Path) -> dict[str, FileSum]:
    """Give a folder the manifest of the files that it has now."""
    names = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    files = {path.relative_to(folder).as_posix(): sum_of(path) for path in names}
    write_manifest(folder, files)
    return files
