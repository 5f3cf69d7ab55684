"""What a run got: a table for the screen, and `report.json` with every annotated clip that is missing."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.download.ledger import LEDGER
from tools.download.place import ASIDE
from tools.download.run import Report

REPORT, IDENTITIES = "report.json", "identities.json"
SHOWN = 10  # problems of the annotations on the screen; all are in the report
WORDS = (
    ("got", "got in this run"),
    ("there", "already there"),
    ("gone", "gone"),
    ("failed", "failed, next run tries again"),
    ("untried", "not tried"),
)


def rows(report: Report) -> list[tuple[str, str, int, float]]:
    """(what, reason, clips, hours) of every state, one row per reason; the clips add up to the annotated ones."""
    clips: Counter[tuple[str, str]] = Counter()
    seconds: dict[tuple[str, str], float] = {}
    for outcome in report.outcomes.values():
        key = (outcome.state, str(outcome.reason or ""))
        clips[key] += 1
        seconds[key] = seconds.get(key, 0.0) + outcome.seconds
    return [
        (words, reason, clips[state, reason], seconds[state, reason] / 3600)
        for state, words in WORDS
        for found, reason in sorted(clips)
        if found == state
    ]


def show(report: Report, out: Path, console: Console) -> None:
    """Print the problems of the annotations and the table."""
    problems = report.annotations.problems
    for problem in problems[:SHOWN]:
        console.print(f"{problem.kind}: {problem}", markup=False, highlight=False, soft_wrap=True)
    if len(problems) > SHOWN:
        console.print(
            f"... and {len(problems) - SHOWN} more problems of the annotations in {out / REPORT}", markup=False
        )
    if report.aside:
        kept = f"{len(report.aside)} clips" if len(report.aside) > 1 else "1 clip"
        names = ", ".join(list(report.aside)[:SHOWN])
        text = f"{kept} of another annotation, or damaged, put aside in {out / ASIDE} (see {LEDGER}): {names!a}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    table = Table(title=report.annotations.source, title_justify="left")
    for title in ("clips", "reason"):
        table.add_column(title)
    for title in ("number", "hours"):
        table.add_column(title, justify="right")
    for words, reason, count, hours in rows(report):
        table.add_row(words, reason, str(count), f"{hours:.2f}" if hours else "")
    table.add_section()
    hours = sum(outcome.seconds for outcome in report.outcomes.values()) / 3600
    table.add_row("annotated", "", str(len(report.outcomes)), f"{hours:.2f}")
    console.print(table)


def write(report: Report, out: Path) -> None:
    """Write report.json (counts, problems of the annotations, what is missing with its reason) and identities.json (the
    video of every clip that is there)."""
    annotations = report.annotations
    content: dict[str, Any] = {
        "source": annotations.source,
        "annotation_licence": annotations.licence,
        "annotations": dict(annotations.counts),
        "problems": [vars(problem) for problem in annotations.problems],
        "table": [
            {"state": words, "reason": reason, "clips": count, "hours": round(hours, 4)}
            for words, reason, count, hours in rows(report)
        ],
        "missing": [
            {
                "clip": name,
                "state": outcome.state,
                "reason": outcome.reason,
                "message": outcome.message,
                "aside": report.aside.get(name),
            }
            for name, outcome in report.outcomes.items()
            if outcome.state not in ("got", "there")
        ],
    }
    _publish(out / REPORT, content)
    # Clips of one video are one person: what `data build --identities` needs to keep them in one split.
    videos = {clip.name: clip.video for clip in annotations.clips}
    there = (name for name, outcome in report.outcomes.items() if outcome.state in ("got", "there"))
    _publish(out / IDENTITIES, {name: f"youtube-{videos[name]}" for name in there})


def _publish(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)
