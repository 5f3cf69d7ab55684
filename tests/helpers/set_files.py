"""Files of a shard set that was built."""

from __future__ import annotations

from pathlib import Path


def set_bytes(out: Path) -> dict[str, bytes]:
    """Files of the set by name, without the report, which tells of times."""
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith("report.")}
