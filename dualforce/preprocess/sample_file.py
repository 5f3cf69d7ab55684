"""A sample on the disk while a build is under way: its tensors and its record in two files beside each other."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save

from data_shards.schema import ClipSample


def store_sample(folder: Path, sample: ClipSample) -> Path:
    """Write a sample into a folder; returns the path without suffix. Raises OSError when the disk is full."""
    stem = folder / sample.key
    data = save({name: value.contiguous() for name, value in sample.tensors().items()})
    stem.with_suffix(".safetensors").write_bytes(data)  # unlike safetensors' own writing, says OSError for a full disk
    record = {"key": sample.key, "identity": sample.identity, "meta": sample.meta}
    stem.with_suffix(".json").write_text(json.dumps(record), encoding="utf-8")
    return stem


def load_sample(stem: Path) -> ClipSample:
    """Read back what `store_sample` wrote."""
    tensors = load_file(stem.with_suffix(".safetensors"))
    record = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    absent = {"flame": None, "flame_valid": None, "text": None}
    return ClipSample(**{**absent, **tensors, **record})
