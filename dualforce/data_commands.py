"""`dualforce data`: make shard sets of videos, look at sets, check them, make new ones out of them. The work is done in
`dualforce.preprocess` and `data_shards`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from data_shards import check, describe, edit
from data_shards.manifest import NOT_LISTED
from data_shards.reader import ShardSet
from data_shards.remote.address import without_secrets
from data_shards.schema import SPLITS, ShardError
from dualforce.preprocess.reasons import part_of

DAMAGED = 1  # exit code: the set was read, and something is wrong with it
INTERRUPTED = 130
SHOWN = 50  # rejections on the screen

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Make shard sets, look at them, check them.")

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # one letter is a drive of Windows


def _here(folder: Path) -> Path:
    """The folder; ShardError for a URL, which training takes and nothing here does."""
    text = folder.as_posix()
    if _URL.match(text):
        given = without_secrets(text.replace(":/", "://", 1))  # of two slashes a path keeps one
        raise ShardError(f"{given}: a URL: expected a folder of this machine")
    return folder


def _all_here(folders: list[Path]) -> list[Path]:
    return [_here(folder) for folder in folders]


SetArgument = Annotated[Path, typer.Argument(metavar="SET", help="folder of a shard set", callback=_here)]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="shard set to write; must not exist", callback=_here)]


@app.command()
def build(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="folder of videos, searched with its subfolders")],
    out: Annotated[Path, typer.Option(help="folder for the shards, new or empty", callback=_here)],
    size: Annotated[int, typer.Option(help="edge of the square face crops in pixels")] = 128,
    face_landmarker: Annotated[
        Path | None, typer.Option(help="MediaPipe's face_landmarker.task; not needed for clips with sidecars")
    ] = None,
    audio_encoder: Annotated[
        Path | None, typer.Option(help="folder of a HuBERT or Whisper model; without one, log-mel features")
    ] = None,
    video_codec: Annotated[
        Path | None, typer.Option(help="folder of the Wan 2.1 VAE (diffusers layout); without one, the dct codec")
    ] = None,
    text_encoder: Annotated[
        Path | None, typer.Option(help="folder of a umT5 encoder with its tokenizer.json, for --captions")
    ] = None,
    captions: Annotated[
        Path | None, typer.Option(help="JSON object: what each video shows (path below SRC, without ending)")
    ] = None,
    motion_extractor: Annotated[
        Path | None, typer.Option(help="LivePortrait's motion_extractor.pth; without one, MediaPipe's motion")
    ] = None,
    flame_encoder: Annotated[
        Path | None, typer.Option(help="DECA's or EMOCA's checkpoint (non-commercial); without one, no FLAME")
    ] = None,
    face_detector: Annotated[
        Path | None,
        typer.Option(help="folder or .onnx file of insightface's face detector; without one, MediaPipe finds faces"),
    ] = None,
    limits: Annotated[Path | None, typer.Option(help="JSON file of what is asked of a video: docs/data.md")] = None,
    identities: Annotated[
        Path | None, typer.Option(help="JSON object: who is in which video (path below SRC, without ending)")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="processes; default: one for each device, at least 2")] = None,
    devices: Annotated[str, typer.Option(help="where encoders run: cpu, or GPUs as cuda:0,cuda:1")] = "cpu",
    validation_share: Annotated[float, typer.Option(help="share of the identities that is held out")] = 0.2,
    licence: Annotated[str | None, typer.Option(help="licence of videos whose sidecar names none")] = None,
    source: Annotated[str | None, typer.Option(help="where the videos come from, for every sample's meta")] = None,
    work: Annotated[
        Path | None, typer.Option(help="folder to keep finished videos in, for later builds; default: OUT, until done")
    ] = None,
) -> None:
    """Make a shard set of a folder of videos. A build that was stopped goes on when it is started again."""
    from dualforce.preprocess.build import BuildOptions, build_shards  # the only command that computes
    from dualforce.preprocess.limits_file import read_limits
    from dualforce.preprocess.quality import Limits

    places = tuple(name.strip() for name in devices.split(",") if name.strip())
    options = BuildOptions(
        size=size, face_landmarker=face_landmarker, audio_encoder=audio_encoder, identities=identities,
        limits=Limits() if limits is None else read_limits(limits),
        video_codec=video_codec, text_encoder=text_encoder, captions=captions,
        motion_extractor=motion_extractor, flame_encoder=flame_encoder, face_detector=face_detector,
        workers=max(2, len(places)) if workers is None else workers, devices=places, validation_share=validation_share,
        licence=licence, origin=source, work=work,
    )  # fmt: skip
    console = Console(stderr=True)
    try:
        report = build_shards(src, out, options, console)
    except KeyboardInterrupt:
        typer.echo("error: interrupted; the same command goes on with the videos that are left", err=True)
        raise typer.Exit(INTERRUPTED) from None
    more = sum(report.manifest["info"].get(NOT_LISTED, {}).values())
    _show_rejected(report.manifest["rejected"], more, out, console)
    _tell(out, report.manifest)
    earlier = f", {report.earlier} finished by an earlier start" if report.earlier else ""
    took = f"{report.seconds:.0f} s; see {out / 'report.html'}"
    typer.echo(f"{report.used} of {report.videos} videos used{earlier}; {took}")


@app.command()
def verify(
    root: SetArgument,
    samples: Annotated[bool, typer.Option("--samples", help="also read and validate every clip")] = False,
    report: Annotated[Path | None, typer.Option("--json", help="file for the findings")] = None,
) -> None:
    """List every damaged file, or clip. Exit code 1 if there is one."""
    if report is not None:
        _check_report(report, root)
    with _bars() as bar:
        found = check.find_faults(root, samples=samples, on_file=bar("reading files"), on_clip=bar("reading clips"))
    for fault in found.faults:
        typer.echo(" ".join(fault.text.split()))
    unread = "" if found.opened or not samples else " (no clip was read, as the set cannot be opened)"
    typer.echo(f"{len(found.faults)} faults: {found.files} files and {found.clips} clips checked{unread}")
    if report is not None:
        report.write_text(json.dumps(asdict(found), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if found.faults:
        raise typer.Exit(DAMAGED)


@app.command()
def inspect(
    root: SetArgument,
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="a clip; default: the whole set")] = None,
    deep: Annotated[bool, typer.Option("--deep", help="read every clip and count the licences")] = False,
) -> None:
    """Show what is in a set, or in one clip."""
    opened = ShardSet.open(root)
    with _bars() as bar:
        if key is None:
            lines = describe.describe_set(opened, deep=deep, advance=bar("reading clips"))
        else:
            lines = describe.describe_clip(opened, key)
    typer.echo("\n".join(lines))


@app.command()
def stats(root: SetArgument) -> None:
    """Compare the manifest's statistics with those of the clips. Exit code 1 if they differ by more than rounding."""
    with _bars() as bar:
        differences = check.compare_statistics(root, on_clip=bar("reading clips"))
    for entry in differences:
        verdict = "differs" if entry.differs else "agrees"
        size = f"{abs(entry.stored - entry.computed):.3g} at {entry.where}"
        values = f"manifest {entry.stored:.9g}, clips {entry.computed:.9g}"
        shown = entry.where if entry.stored != entry.stored else f"largest difference {size} ({values})"
        typer.echo(f"{entry.stream}: {verdict}: {shown}")
    if any(entry.differs for entry in differences):
        raise typer.Exit(DAMAGED)


@app.command()
def merge(
    out: OutArgument,
    roots: Annotated[
        list[Path], typer.Argument(metavar="SET SET...", help="folders of shard sets", callback=_all_here)
    ],
    prefix: Annotated[bool, typer.Option("--prefix", help='put the number of the set before keys: "1-KEY"')] = False,
) -> None:
    """Make one set out of several with the same extractors."""
    with _bars() as bar:
        manifest = edit.merge(out, roots, prefix=prefix, advance=bar("writing clips"))
    _tell(out, manifest)


@app.command()
def split(
    root: SetArgument,
    out: OutArgument,
    validation: Annotated[float, typer.Option(help="share of the identities that is held out")],
    seed: Annotated[int, typer.Option(help="another seed deals another way")] = 0,
) -> None:
    """Deal the identities of a set into train and validation anew."""
    with _bars() as bar:
        manifest = edit.split(root, out, validation=validation, seed=seed, advance=bar("writing clips"))
    _tell(out, manifest)


@app.command()
def drop(
    root: SetArgument,
    out: OutArgument,
    identity: Annotated[list[str] | None, typer.Option(help="drop all clips of this identity; repeatable")] = None,
    key: Annotated[list[str] | None, typer.Option(help="drop this clip; repeatable")] = None,
) -> None:
    """Make a set without some identities or clips; nothing in it names them."""
    with _bars() as bar:
        done = edit.drop(root, out, identities=identity or (), keys=key or (), advance=bar("writing clips"))
    typer.echo(f"{done.clips} clips dropped, {done.kept} kept; {done.rejected} entries of rejected removed")
    for name in done.mentions:
        typer.echo(f"warning: kept clip {name!r} names something that was dropped, in key, identity or meta", err=True)


@app.command()
def upgrade(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="shard set of an earlier version", callback=_here)],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="shard set to write; must not exist", callback=_here)],
) -> None:
    """Write a set of an earlier version, or one without statistics of its FLAME, anew in the present one."""
    from data_shards.upgrade import upgrade as upgrade_set  # the only command that knows earlier versions

    edit.check_out(old, new)
    upgrade_set(old, new)
    _tell(new, ShardSet.open(new).manifest)


def _check_report(report: Path, root: Path) -> None:
    """Before hours of reading. Raises ShardError where the file cannot be written, or would be part of the set."""
    if report.resolve().is_relative_to(root.resolve()):
        raise ShardError(f"--json {report}: inside the shard set: expected a file outside it")
    try:
        there = report.exists()
        report.open("a", encoding="utf-8").close()
        if not there:
            report.unlink()
    except OSError as error:
        raise ShardError(f"--json {report}: {error.strerror}: expected a file that can be written") from None


@contextmanager
def _bars() -> Iterator[Callable[[str], edit.Advance]]:
    """Progress bars on a terminal, nothing elsewhere: called with a title, gives what moves its bar."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def bar(title: str) -> edit.Advance:
            task = progress.add_task(title, total=None, visible=False)
            return lambda done, total: progress.update(task, completed=done, total=total, visible=True)

        yield bar


def _show_rejected(rejected: list[dict[str, Any]], more: int, out: Path, console: Console) -> None:
    """Why videos or windows were not used, the first of them; `more` are not in the manifest."""
    if not rejected:
        return
    table = Table(title="Rejected", title_justify="left")
    for title in ("video", "part", "reason", "detail"):
        table.add_column(title, overflow="fold")
    for entry in rejected[:SHOWN]:
        row = (entry["source"], part_of(entry), entry["reason"], entry["detail"])
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    if len(rejected) + more > SHOWN:
        others = len(rejected) + more - SHOWN
        console.print(f"{others} more are in {out / 'report.json'}", markup=False, highlight=False)


def _tell(out: Path, manifest: dict[str, Any]) -> None:
    parts = (f"{len(s['identities'])} identities and {s['samples']} clips in {name}"
             for name in SPLITS for s in [manifest["splits"][name]])  # fmt: skip
    typer.echo(f"{out}: {', '.join(parts)}")
