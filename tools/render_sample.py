"""Render talking faces with known truth: `python -m tools.render_sample --out DIR`.

Every clip is NAME.mp4 with NAME.json beside it (motion, face and mouth boxes per pixel frame, sound offset; see
`data_shards/sample/README.md`). The same options give the same pictures, sound and sidecars. The bundled sample was
made with the defaults.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dualforce.codecs.media import MediaError, write_video
from dualforce.types import FPS
from tools.render.clip import Clip, make_clip
from tools.render.scene import Box
from tools.render.sound import MARGIN_S

CRF = 20  # H.264 quality of the written clips
_SMALLEST, _LARGEST = 32, 1024


def _check(identities: int, seconds: float, size: int, seed: int, offset: float) -> None:
    """Raises ValueError naming the first option that cannot be rendered."""
    if identities < 1:
        raise ValueError(f"--identities {identities}: expected at least 1")
    if not 1 / FPS <= seconds <= 3600:
        raise ValueError(f"--seconds {seconds}: expected {1 / FPS} to 3600")
    if size % 2 or not _SMALLEST <= size <= _LARGEST:
        raise ValueError(f"--size {size}: expected an even number from {_SMALLEST} to {_LARGEST}")
    if seed < 0:
        raise ValueError(f"--seed {seed}: expected 0 or more")
    if not -MARGIN_S <= offset <= MARGIN_S:
        raise ValueError(f"--offset {offset}: expected {-MARGIN_S} to {MARGIN_S} seconds")


def write_clip(clip: Clip, out: Path, on_frame: Callable[[], None]) -> Path:
    """Write NAME.mp4 and then NAME.json into `out`; returns the video's path. Raises MediaError, OSError."""
    video = out / f"{clip.who.name}.mp4"
    faces: list[Box] = []
    mouths: list[Box] = []

    def pixels() -> Iterator[NDArray[np.uint8]]:
        for picture in clip.pictures():
            faces.append(picture.face_box)
            mouths.append(picture.mouth_box)
            on_frame()
            yield picture.pixels

    write_video(video, pixels(), clip.wave, crf=CRF)
    partial = out / f".{clip.who.name}.json.partial"
    partial.write_text(json.dumps(clip.sidecar(faces, mouths), separators=(",", ":")) + "\n", encoding="utf-8")
    os.replace(partial, video.with_suffix(".json"))
    return video


def main(
    out: Annotated[Path, typer.Option(help="Folder for the clips; made if absent.")],
    identities: Annotated[int, typer.Option(help="People; one clip each.")] = 20,
    seconds: Annotated[float, typer.Option(help="Length of a clip.")] = 3.4,
    size: Annotated[int, typer.Option(help="Width and height in pixels.")] = 160,
    seed: Annotated[int, typer.Option(help="Another seed gives other people.")] = 0,
    offset: Annotated[float, typer.Option(help="Seconds by which the sound comes later than the picture.")] = 0.0,
) -> None:
    """Render talking faces with known truth into a folder."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    try:
        _check(identities, seconds, size, seed, offset)
        out.mkdir(parents=True, exist_ok=True)
        with Progress(*columns, console=console) as progress:
            frames = round(seconds * FPS)
            task = progress.add_task("rendering pictures", total=identities * frames)
            for index in range(identities):
                clip = make_clip(seed, index, frames, size, offset)
                write_clip(clip, out, lambda: progress.advance(task))
    except (ValueError, MediaError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        raise typer.Exit(2) from error
    console.print(f"{identities} clips in {out}")


if __name__ == "__main__":
    typer.run(main)
