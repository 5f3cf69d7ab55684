"""The command line that the three download tools share."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tools.download import table
from tools.download.records import Annotations
from tools.download.run import OptionError, Options, Report, download
from tools.download.ytdlp import Fetcher, YtDlp

INTERRUPTED = 130  # what a shell gives for a process ended by Ctrl-C
RATE_HELP = "Bytes a second of all workers together, as 500K or 4M; with --whole alone, as ffmpeg reads sections."
UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}


def make_app(read: Callable[[Path], Annotations], about: str) -> typer.Typer:
    """A command that fetches what `read` finds in the annotations."""
    app = typer.Typer(add_completion=False)

    @app.command(help=about)
    def main(
        annotations: Annotated[Path, typer.Argument(help="The published annotations.")],
        out: Annotated[Path, typer.Argument(help="Folder for the clips; a run there goes on where the last ended.")],
        workers: Annotated[int, typer.Option(help="Files fetched at a time.")] = 2,
        rate: Annotated[str | None, typer.Option(help=RATE_HELP)] = None,
        sleep: Annotated[float, typer.Option(help="Seconds that a worker waits before each file.")] = 2.0,
        cookies: Annotated[Path | None, typer.Option(help="Cookies of a browser, in Netscape format.")] = None,
        limit: Annotated[int | None, typer.Option(help="Most clips to try in this run.")] = None,
        retry_gone: Annotated[bool, typer.Option("--retry-gone", help="Ask again for what was gone.")] = False,
        whole: Annotated[bool, typer.Option("--whole", help="Fetch whole videos, not sections of them.")] = False,
        tries: Annotated[int, typer.Option(help="Tries per file when an error may pass.")] = 4,
    ) -> None:
        options = Options(workers=workers, limit=limit, retry_gone=retry_gone, whole=whole, tries=tries)
        try:
            options.check()
            found = read(annotations)
            report = run(found, out, make_fetcher(rate, workers, sleep, cookies, whole=whole), options)
        except (ValueError, OSError) as error:
            # Every error of the parts used here that a user can cause is a ValueError with one complete line.
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        if report.interrupted:
            raise typer.Exit(INTERRUPTED)

    return app


def make_fetcher(rate: str | None, workers: int, sleep: float, cookies: Path | None, *, whole: bool) -> Fetcher:
    """yt-dlp with these options. Raises OptionError, also for a rate without `whole`, which nothing would heed, and
    ToolError."""
    if not 0 <= sleep <= 3600:
        raise OptionError(f"--sleep {sleep}: expected 0 to 3600 seconds")
    share = None if rate is None else max(1, parse_rate(rate) // workers)
    if rate is not None and not whole:
        raise OptionError(f"--rate {rate}: binds whole videos alone: expected --whole too")
    fetcher = YtDlp(rate=share, sleep=sleep, cookies=cookies)
    fetcher.check()
    return fetcher


def parse_rate(text: str) -> int:
    """Bytes a second of a number with K, M or G behind it. Raises OptionError."""
    found = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)([KMG]?)", text.upper())
    value = int(float(found.group(1)) * UNITS[found.group(2)]) if found else 0
    if value < 1:
        raise OptionError(f"--rate {text!a}: expected bytes a second above 0, as 500K or 4M")
    return value


def run(annotations: Annotations, out: Path, fetcher: Fetcher, options: Options) -> Report:
    """Fetch with a progress bar; print and store what came of it."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("clips", total=None)
        report = download(
            annotations, out, fetcher, options, progress=lambda done, all: bar.update(task, completed=done, total=all)
        )
    table.write(report, out)
    table.show(report, out, console)
    return report
