"""What a run has written of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CLOCK = ("seconds_per_step", "data_wait", "tokens_per_second")


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """Metrics of one kind without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines if line["kind"] == kind]
