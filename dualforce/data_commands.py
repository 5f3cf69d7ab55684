"""`dualforce data`: look at shard sets, check them, make new ones out of them. The work is done in `data_shards`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_shards import check, describe, edit
from data_shards.reader import ShardSet
from data_shards.schema import SPLITS, ShardError

DAMAGED = 1  # exit code: the set was read, and something is wrong with it

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at shard sets, check them, make new ones.")

SetArgument = Annotated[Path, typer.Argument(metavar="SET", help="folder of a shard set")]
OutArgument = Annotated[Path, typer.Argument(metavar="OUT", help="shard set to write; must not exist")]


@app.command()
def verify(
    root: SetArgument,
    samples: Annotated[bool, typer.Option("--samples", help="also read and validate every clip")] = False,
    report: Annotated[Path | None, typer.Option("--json", help="file for the findings")] = None,
) -> None:
    """List every damaged file, or clip. Exit code 1 if there is one."""
    if report is not None and report.resolve().is_relative_to(root.resolve()):
        raise ShardError(f"--json {report}: inside the shard set: expected a file outside it")
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
    roots: Annotated[list[Path], typer.Argument(metavar="SET SET...", help="folders of shard sets")],
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
    old: Annotated[Path, typer.Argument(metavar="OLD", help="shard set of an earlier version")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="shard set to write; must not exist")],
) -> None:
    """Write a set of an earlier version anew in the present one."""
    from data_shards.upgrade import upgrade as upgrade_set  # the only command that knows earlier versions

    edit.check_out(old, new)
    upgrade_set(old, new)
    _tell(new, ShardSet.open(new).manifest)


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


def _tell(out: Path, manifest: dict[str, Any]) -> None:
    parts = (f"{len(s['identities'])} identities and {s['samples']} clips in {name}"
             for name in SPLITS for s in [manifest["splits"][name]])  # fmt: skip
    typer.echo(f"{out}: {', '.join(parts)}")
