"""Build a shard set from a folder of talking-head videos: `python -m tools.build_shards SRC --out DIR`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dualforce.preprocess.build import BuildOptions, BuildReport, build_shards

app = typer.Typer(add_completion=False)


@app.command()
def main(
    src: Annotated[Path, typer.Argument(help="Folder of videos, searched with its subfolders.")],
    out: Annotated[Path, typer.Option(help="New folder for the shards.")],
    size: Annotated[int, typer.Option(help="Edge of the square face crops in pixels.")] = 128,
    face_landmarker: Annotated[
        Path | None, typer.Option(help="MediaPipe's face_landmarker.task; not needed for rendered clips with sidecars.")
    ] = None,
    audio_encoder: Annotated[
        Path | None, typer.Option(help="Folder of a HuBERT or Whisper model; without one, log-mel features.")
    ] = None,
    identities: Annotated[
        Path | None, typer.Option(help="JSON object: who is in which video (path below SRC, without ending).")
    ] = None,
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
    validation_share: Annotated[float, typer.Option(help="Share of the identities held out.")] = 0.2,
) -> None:
    """Cut face crops, check them, encode them and write WebDataset shards with train and validation split."""
    options = BuildOptions(
        size=size, face_landmarker=face_landmarker, audio_encoder=audio_encoder, identities=identities,
        workers=workers, validation_share=validation_share,
    )
    console = Console(stderr=True)
    try:
        report = build_shards(src, out, options, console)
    except (ValueError, OSError) as error:
        # Every error of the parts used here that a user can cause is a ValueError with one complete line.
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    show(report, out, console)


def show(report: BuildReport, out: Path, console: Console) -> None:
    """Print what was made, and every rejection with its reason."""
    rejected = report.manifest["rejected"]
    if rejected:
        table = Table(title="Rejected", title_justify="left")
        for title in ("video", "window", "reason", "detail"):
            table.add_column(title, overflow="fold")
        for entry in rejected:
            table.add_row(entry["source"], str(entry.get("window", "all")), entry["reason"], entry["detail"])
        console.print(table, markup=False)
    for name, split in report.manifest["splits"].items():
        console.print(f"{name}: {split['samples']} samples of {len(split['identities'])} identities")
    console.print(
        f"{report.used} of {report.videos} videos used, {report.seconds:.0f} s, in {out}", markup=False, highlight=False
    )


if __name__ == "__main__":
    app()
