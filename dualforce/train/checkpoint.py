"""Saving, resuming and reading checkpoints. DeepSpeed's files are pickles, so only a run's own folder is ever loaded.

RUN/checkpoints/step-000010/   DeepSpeed's files, rng-00000.safetensors per rank, state.json; manifest.json last
RUN/checkpoints/LATEST         the newest complete one, replaced after every rank has written
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from dualforce.config import ConfigError
from dualforce.config_file import read_json
from dualforce.train.agree import gathered, together
from dualforce.train.engine import BATCH_KEYS
from dualforce.train.gather_unit import Slot, unpack_state
from dualforce.train.generators import generator_states, restore_generators
from dualforce.train.manifest import (
    FileSum,
    begin_folder,
    check_file,
    check_share,
    read_bytes,
    read_manifest,
    replace_file,
    summed,
    with_others,
    write_manifest,
)
from dualforce.train.partitions import read_stored
from dualforce.train.reshape import describe_change, load_reshaped, other_partition
from megatron_ext.parallel.grid import ProcessGrid

logger = logging.getLogger(__name__)

POINTER, STATE = "LATEST", "state.json"


@dataclass(frozen=True)
class SavedState:
    """What DeepSpeed does not keep. The data position is the step: the order is a function of (shard set, seed, step),
    the noise one of (seed, step)."""

    step: int  # optimizer steps done
    world: int
    sequence: int
    zero_stage: int
    run: dict[str, Any]  # the run's configuration
    engine: dict[str, Any]  # the DeepSpeed configuration with its batch keys filled in
    units: dict[str, dict[str, list[Slot]]]  # where each parameter lies in the flat tensors of its gather unit
    optimizer: str  # its class
    shards: str  # hash of the shard set
    config: dict[str, Any]  # what config.json has beside the run: model, extractors, statistics, geometry
    # Set (its number in data.shards) and key of each clip that could not be read, over all ranks since the run began.
    damaged: tuple[tuple[int, str], ...] = ()


def save(engine: Any, run_dir: Path, state: SavedState, grid: ProcessGrid) -> None:
    """Write a checkpoint; every rank calls it. The pointer moves only after all ranks have finished.

    Raises ConfigError, the same on every rank, where one of them cannot write; the pointer is then where it was.
    """
    folder, tag = run_dir / "checkpoints", _tag(state.step)
    together(grid, lambda: begin_folder(folder / tag) if grid.rank == 0 else None)
    with summed(engine) as writer:
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def own_files() -> dict[str, FileSum]:
        if writer.error is not None:
            raise writer.error
        generators = tensor_bytes(generator_states(grid.device))
        writer.add(folder / tag / _rng_file(grid.rank), generators)
        if grid.rank == 0:
            writer.add(folder / tag / STATE, json.dumps(asdict(state), indent=1).encode())
        return {path.relative_to(folder / tag).as_posix(): found for path, found in writer.sums.items()}

    try:
        files = {name: one for own in gathered(grid, own_files) for name, one in own.items()}
    except ConfigError:
        if grid.rank == 0:  # what is there of it takes the room that was too small
            shutil.rmtree(folder / tag, ignore_errors=True)
        raise

    def publish() -> None:
        write_manifest(folder / tag, with_others(folder / tag, files))
        replace_file(folder / POINTER, tag + "\n")

    together(grid, publish if grid.rank == 0 else lambda: None)


def newest_step(run_dir: Path) -> int:
    """The step of a run's newest complete checkpoint; ConfigError when there is none."""
    pointer = run_dir / "checkpoints" / POINTER
    text = read_bytes(pointer, "a run with a checkpoint")
    found = re.fullmatch(rb"step-(\d{6,})\n?", text)
    if not found:
        raise ConfigError(f"{pointer}: {text[:40]!r}: expected the name of a checkpoint, such as step-000500")
    return int(found[1])


def read_state(run_dir: Path, step: int | None = None) -> SavedState:
    """The state of a run's newest complete checkpoint, or of `step`, compared with the manifest; ConfigError when there
    is none, or not as it was written."""
    step = newest_step(run_dir) if step is None else step
    folder = run_dir / "checkpoints" / _tag(step)
    path, files = folder / STATE, read_manifest(folder)
    if STATE not in files:
        raise ConfigError(f"{folder}: no {STATE} in its manifest: expected a checkpoint of this version")
    check_file(folder, STATE, files[STATE])
    values = read_json(path)
    for key in ("units", "shards", "config", "damaged"):
        if key not in values:
            raise ConfigError(
                f"{path}: key {key} is missing: expected a checkpoint of this version, 0.1.0 exports its own"
            )
    try:
        saved = SavedState(**values)
        units = {
            unit: {flat: [Slot(name, tuple(shape), at) for name, shape, at in slots] for flat, slots in of.items()}
            for unit, of in saved.units.items()
        }
        damaged = tuple((int(bucket), str(key)) for bucket, key in saved.damaged)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if saved.step != step:
        raise ConfigError(f"{path}: step = {saved.step}: expected {step}, as its folder is named")
    return replace(saved, units=units, damaged=damaged)


def run_config(run_dir: Path, step: int | None = None) -> dict[str, Any]:
    """What config.json said when the newest checkpoint, or that of `step`, was written."""
    saved = read_state(run_dir, step)
    return {"run": saved.run, **saved.config}


def resume(engine: Any, run_dir: Path, expected: SavedState, grid: ProcessGrid) -> int:
    """Load the newest checkpoint into the engine and the generators; returns the steps done. Every rank calls it.

    Raises ConfigError, the same on every rank, when the checkpoint was written with another configuration, lacks files
    or has other bytes than were written: each rank reads its share of the files before any of them loads. Intervals,
    `stop_at` and the run's shape may differ: with the same ranks and ZeRO stage DeepSpeed loads its own files, else
    reshape.py does. Generators of a rank that the checkpoint has not got stay as they began: losses do not depend on
    them.
    """
    saved = together(grid, lambda: _resumable(run_dir, expected))
    folder, tag = run_dir / "checkpoints", _tag(saved.step)
    change = describe_change(saved, expected)
    if change is not None:
        logger.info("%s: step %d goes on in another shape: %s", run_dir, saved.step, change)
    together(grid, lambda: check_share(folder / tag, read_manifest(folder / tag), grid.rank, grid.world))
    if other_partition(saved, expected):
        load_reshaped(engine, folder / tag, saved, expected, grid)
    else:
        loaded, _ = engine.load_checkpoint(str(folder), tag=tag)
        if loaded is None:
            raise ConfigError(f"{folder / tag}: DeepSpeed found nothing to load")
    if grid.rank < saved.world:
        restore_generators(load_file(folder / tag / _rng_file(grid.rank)), grid.device)
    return saved.step


def read_fp32_state(run_dir: Path, step: int | None = None) -> dict[str, Tensor]:
    """All weights of a checkpoint in fp32 on the CPU, whatever the ZeRO stage; needs neither GPU nor ranks.

    Keys are those of TrainModule: `model.` for the towers, `heads.` for the loss heads. ConfigError for a checkpoint
    that is not as it was written.
    """
    saved = read_state(run_dir, step)
    folder, tag = run_dir / "checkpoints", _tag(saved.step)
    check_share(folder / tag, read_manifest(folder / tag), 0, 1)
    if saved.zero_stage == 0:
        # Nothing to merge, and DeepSpeed's converter does not read it. In bf16 the weights are the optimizer's copies.
        stored = read_stored(folder / tag, 0, False, saved.world, saved.units)
        return unpack_state({name: held[0][1].weights for name, held in stored.pieces.items()}, saved.units)
    zero_to_fp32 = importlib.import_module("deepspeed.utils.zero_to_fp32")
    state: dict[str, Tensor] = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=tag)
    return unpack_state(state, saved.units)


def _resumable(run_dir: Path, expected: SavedState) -> SavedState:
    saved = read_state(run_dir)
    _check_same(saved, expected, run_dir)
    return saved


def _check_same(saved: SavedState, expected: SavedState, run_dir: Path) -> None:
    if saved.optimizer != expected.optimizer:
        raise ConfigError(
            f"{run_dir}: checkpoint of step {saved.step} has optimizer = {saved.optimizer}, "
            f"this run {expected.optimizer}"
        )
    if saved.units != expected.units:
        unit = next(u for u in {**saved.units, **expected.units} if saved.units.get(u) != expected.units.get(u))
        raise ConfigError(
            f"{run_dir}: checkpoint of step {saved.step} has other parameters in {unit} than this version of the model"
        )
    changes = [*_differences(saved.run, expected.run, ""), *_differences(saved.engine, expected.engine, "deepspeed")]
    for key, old, new in changes:
        if not _free(key, saved, expected):
            raise ConfigError(
                f"{run_dir}: checkpoint of step {saved.step} has {key} = {json.dumps(old)}, this run {json.dumps(new)}"
            )


def _free(key: str, saved: SavedState, expected: SavedState) -> bool:
    if other_partition(saved, expected) and (key == FUSED or key.startswith(f"{PARTITION}.")):
        return True
    return key in FREE_ON_RESUME or (key in FREE_IN_ANOTHER_SHAPE and describe_change(saved, expected) is not None)


FREE_ON_RESUME = frozenset(
    f"train.{name}" for name in ("stop_at", "log_every", "save_every", "validate_every", "image_every")
) | {
    "data.prefetch", "data.workers", "data.allow_new_shards", "data.max_damaged",
    "parallel.recompute", "parallel.graphs",
    # Where files lie; what is in them is compared (of the shards by their hash).
    "data.shards", "data.cache", "data.cache_gib", "data.video_codec", "deepspeed",
    # How the clips of a step, whose number stays, are dealt.
    "data.max_micro_batch", "parallel.sequence",
}  # fmt: skip
# What follows from the ranks, and from the micro-batches where the DeepSpeed file says "auto".
FREE_IN_ANOTHER_SHAPE = frozenset(f"deepspeed.{key}" for key in (*BATCH_KEYS, "data_types.grad_accum_dtype"))
# Where states lie and how they are stepped, not what they are.
PARTITION, FUSED = "deepspeed.zero_optimization", "deepspeed.optimizer.params.fused"


def _differences(old: Any, new: Any, key: str) -> list[tuple[str, Any, Any]]:
    if any(isinstance(side, dict) for side in (old, new)):
        old, new = ({} if side is None else side for side in (old, new))  # a section that one file has not got
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        return [d for n in names for d in _differences(old.get(n), new.get(n), f"{key}.{n}" if key else n)]
    return [] if old == new else [(key, old, new)]


def _tag(step: int) -> str:
    return f"step-{step:06d}"


def _rng_file(rank: int) -> str:
    return f"rng-{rank:05d}.safetensors"
