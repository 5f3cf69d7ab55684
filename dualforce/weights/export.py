"""Writing a model folder: `config.json`, `model.safetensors` (or shards with an index) and a `README.md` card."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from dualforce.config import ModelConfig, validate
from dualforce.weights.card import model_card
from dualforce.weights.keys import Rule, Shape, WeightsError, check_names, key_table, parameter_shapes
from dualforce.weights.stream import DTYPE_NAMES, PlannedTensor, byte_count, write_tensors

FORMAT = "dualforce-model"
FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOWER_PREFIX = "model."  # of the DualTower inside what the trainer's engine wraps; the rest are loss heads


def folder_config(run_config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The model folder's config from a run's `config.json`; WeightsError names a key that is missing."""
    missing = [key for key in ("run", "model", "extractors", "statistics", "geometry") if key not in run_config]
    if missing:
        raise WeightsError(f"{origin}: key {missing[0]} is missing: expected the config.json of a training run")
    noise = run_config["run"].get("noise", {})
    absent = [key for key in ("shift_video", "sample_shift_struct") if key not in noise]
    if absent:
        raise WeightsError(f"{origin}: key run.noise.{absent[0]} is missing: expected a training run's config.json")
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "model": run_config["model"],
        "extractors": run_config["extractors"],
        "statistics": run_config["statistics"],
        "geometry": run_config["geometry"],
        "noise": {key: noise[key] for key in ("shift_video", "sample_shift_struct")},
    }


def tower_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The DualTower's part of a training state, under DualTower's own names; loss heads are left out."""
    return {name.removeprefix(TOWER_PREFIX): t for name, t in state.items() if name.startswith(TOWER_PREFIX)}


def write_model(
    folder: Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    max_shard_bytes: int = 5_000_000_000,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> None:
    """Write a model folder from `state` (DualTower's parameter names) and `config` (see `folder_config`).

    The folder appears under its name only when it is complete. Tensors are written one at a time, so a lazy mapping is
    never held in memory whole. Raises WeightsError when the folder exists and is not empty, and when keys, shapes or
    values do not fit the model.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WeightsError(f"{folder}: exists and is not empty: expected a new folder for the model")
    if dtype not in DTYPE_NAMES:
        raise WeightsError(f"{folder}: dtype {dtype}: expected one of {', '.join(map(str, DTYPE_NAMES))}")
    model = validate(ModelConfig, config["model"], f"{folder}/{CONFIG_FILE}: model")
    table = key_table(model)
    check_names(list(state), [rule.inner for rule in table], str(folder))
    shards = _planned_shards(state, table, parameter_shapes(model), dtype, max_shard_bytes)
    with _published(folder) as work:
        hashes = _write_shards(work, shards, dtype, progress)
        text = json.dumps(config, indent=1) + "\n"
        (work / CONFIG_FILE).write_text(text, encoding="utf-8")
        hashes[CONFIG_FILE] = hashlib.sha256(text.encode()).hexdigest()
        count = sum(torch.Size(tensor.shape).numel() for shard in shards for tensor in shard)
        (work / "README.md").write_text(model_card(config, hashes, count, dtype), encoding="utf-8")


@contextmanager
def _published(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` that takes its name at the end, and is removed when something fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield work
        work.chmod(0o755)  # mkdtemp keeps others out
        os.replace(work, folder)
    except ValueError as error:
        raise WeightsError(f"{folder}: {error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _planned_shards(
    state: Mapping[str, Tensor], table: list[Rule], shapes: Mapping[str, Shape], dtype: torch.dtype, max_bytes: int
) -> list[list[PlannedTensor]]:
    """Public tensors in the table's order, cut into files of at most `max_bytes` (a larger tensor has its own)."""
    shards: list[list[PlannedTensor]] = [[]]
    used = 0
    for planned in (planned for rule in table for planned in _planned(state, rule, shapes[rule.inner])):
        size = byte_count(planned.shape, dtype)
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(planned)
        used += size
    return shards


def _planned(state: Mapping[str, Tensor], rule: Rule, shape: Shape) -> Iterator[PlannedTensor]:
    for name in rule.public:
        yield PlannedTensor(name, rule.public_shape(shape), partial(_public_part, state, rule, shape, name))


def _public_part(state: Mapping[str, Tensor], rule: Rule, shape: Shape, name: str) -> Tensor:
    tensor = state[rule.inner]
    if tuple(tensor.shape) != shape:
        raise WeightsError(f"{rule.inner} has shape {list(tensor.shape)}: expected {list(shape)}")
    return rule.to_public(tensor)[name]


def _write_shards(work: Path, shards: list[list[PlannedTensor]], dtype: torch.dtype, progress: bool) -> dict[str, str]:
    """Write the weight files (and the index when there are several); returns the sha256 of each file."""
    count = len(shards)
    names = [SINGLE_FILE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    with Progress(disable=not progress) as bar:
        hashes = {
            name: write_tensors(work / name, shard, dtype)
            for name, shard in zip(names, bar.track(shards, description="writing weights"), strict=True)
        }
    if count > 1:
        total = sum(byte_count(tensor.shape, dtype) for shard in shards for tensor in shard)
        where = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1) + "\n"
        (work / INDEX_FILE).write_text(index, encoding="utf-8")
        hashes[INDEX_FILE] = hashlib.sha256(index.encode()).hexdigest()
    return hashes
