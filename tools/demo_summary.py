"""What a demo has done, in numbers: from the shard manifest and the training's metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

Row = dict[str, Any]


class SummaryError(ValueError):
    """A result of an earlier stage that cannot be summed up; one line for the user."""


def summarise(out: Path, source: Path, seconds: dict[str, float]) -> Row:
    """Numbers of the demo in folder `out`. Raises SummaryError when metrics or manifest lack what is needed."""
    manifest = json.loads((out / "shards" / "manifest.json").read_text(encoding="utf-8"))
    first, last = validation_rows(out / "run" / "metrics.jsonl") if held_out(manifest) else (None, None)
    return {
        "source": str(source),
        "counts": counts(manifest),
        "validation_video_loss": video_losses(first, last) if first and last else None,
        "losses": {"first_validation": first, "last_validation": last},
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "files": {
            name: str(out / path)
            for name, path in (
                *(("shards", "shards"), ("run", "run"), ("tensorboard", "run/tensorboard")),
                *(("model", "model"), ("video", "sample.mp4"), ("summary", "summary.json")),
            )
        },
    }


def held_out(manifest: Row) -> bool:
    """Whether a clip was held out: a single identity cannot be split."""
    return bool(manifest["splits"]["validation"]["samples"])


def counts(manifest: Row) -> Row:
    """Samples and identities by split, and the rejected videos with their reasons."""
    result: Row = {
        name: {"samples": split["samples"], "identities": len(split["identities"])}
        for name, split in manifest["splits"].items()
    }
    return result | {"rejected": manifest["rejected"]}


def validation_rows(path: Path) -> tuple[Row, Row]:
    """First and last validation of a run. Raises SummaryError unless there are two, the first before any step."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = [row for row in rows if row.get("kind") == "validation"]
    if len(found) < 2 or found[0]["step"] != 0:
        steps = [row["step"] for row in found]
        raise SummaryError(f"{path}: validations at steps {steps}: expected one at step 0 and one at the end")
    return found[0], found[-1]


def video_losses(first: Row, last: Row) -> Row:
    """Held-out video loss of the untrained model, of the best linear predictor and of the trained model."""
    linear, trained = float(last["video_linear"]), float(last["video"])
    return {
        "untrained": float(first["video"]),
        "best_linear_predictor": linear,
        "trained": trained,
        "below_best_linear_predictor": round(1 - trained / linear, 4),
    }


def show(summary: Row, console: Console) -> None:
    """Print the summary as tables."""
    table = Table(title="demo", show_header=False, title_justify="left")
    for name in ("train", "validation"):
        split = summary["counts"][name]
        table.add_row(f"{name} clips", f"{split['samples']} of {split['identities']} identities")
    for item in summary["counts"]["rejected"]:
        table.add_row("rejected", escape(f"{item['source']}: {item['reason']} ({item['detail']})"))
    loss = summary["validation_video_loss"]
    if loss is None:
        table.add_row("held-out video loss", "none: all clips are of one identity")
    else:
        below = loss["below_best_linear_predictor"]
        share = f"{abs(below):.1%} {'below' if below >= 0 else 'above'} the linear predictor"
        table.add_row("held-out video loss, untrained", f"{loss['untrained']:.3f}")
        table.add_row("held-out video loss, best linear predictor", f"{loss['best_linear_predictor']:.3f}")
        table.add_row("held-out video loss, trained", f"{loss['trained']:.3f} ({share})")
    table.add_row("seconds", ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items()))
    for name, path in summary["files"].items():
        table.add_row(name, escape(path))
    console.print(table)
