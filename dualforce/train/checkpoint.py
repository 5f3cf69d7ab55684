"""Saving, resuming and reading checkpoints. DeepSpeed's files are pickles, so only a run's own folder is ever loaded.

RUN/checkpoints/step-000010/   DeepSpeed's files, rng-00000.safetensors per rank, state.json
RUN/checkpoints/LATEST         the newest complete one, replaced after every rank has written
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from dualforce.config import ConfigError, read_json
from dualforce.train.engine import BATCH_KEYS
from dualforce.train.gather_unit import Slot, unpack_state
from dualforce.train.partitions import files_of
from dualforce.train.reshape import describe_change, load_reshaped, other_partition, together
from megatron_ext.parallel.grid import ProcessGrid

logger = logging.getLogger(__name__)

POINTER = "LATEST"


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
    # Set (its number in data.shards) and key of each clip that could not be read, over all ranks since the run began.
    damaged: tuple[tuple[int, str], ...] = ()  # checkpoints from before it was kept count from zero


def save(engine: Any, run_dir: Path, state: SavedState, grid: ProcessGrid) -> None:
    """Write a checkpoint; every rank calls it. The pointer moves only after all ranks have finished."""
    folder, tag = run_dir / "checkpoints", _tag(state.step)
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    save_file(_generator_states(grid.device), folder / tag / f"rng-{grid.rank:05d}.safetensors")
    if grid.rank == 0:
        _replace(folder / tag / "state.json", json.dumps(asdict(state), indent=1))
    if grid.world > 1:
        dist.barrier()
    if grid.rank == 0:
        _replace(folder / POINTER, tag + "\n")


def read_state(run_dir: Path, step: int | None = None) -> SavedState:
    """The state of a run's newest complete checkpoint, or of `step`; ConfigError when there is none."""
    folder = run_dir / "checkpoints"
    pointer = folder / POINTER
    if step is None and not pointer.is_file():
        raise ConfigError(f"{pointer}: no such file; expected a run with a checkpoint")
    tag = pointer.read_text(encoding="utf-8").strip() if step is None else _tag(step)
    values = read_json(folder / tag / "state.json")
    for key in ("units", "shards"):
        if key not in values:
            path = folder / tag / "state.json"
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
        return replace(saved, units=units, damaged=damaged)
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder / tag / 'state.json'}: {error}") from None


def resume(engine: Any, run_dir: Path, expected: SavedState, grid: ProcessGrid) -> int:
    """Load the newest checkpoint into the engine and the generators; returns the steps done. Every rank calls it.

    Raises ConfigError, the same on every rank, when the checkpoint was written with another configuration or lacks
    files. Intervals, `stop_at` and the run's shape may differ: with the same ranks and ZeRO stage DeepSpeed loads its
    own files, else reshape.py does. Generators of a rank that the checkpoint has not got stay as they began: losses do
    not depend on them.
    """
    saved = read_state(run_dir)
    _check_same(saved, expected, run_dir)
    folder, tag = run_dir / "checkpoints", _tag(saved.step)
    generators = folder / tag / f"rng-{grid.rank:05d}.safetensors"
    change = describe_change(saved, expected)
    if change is not None:
        logger.info("%s: step %d goes on in another shape: %s", run_dir, saved.step, change)
    together(grid, lambda: _check_files(saved, expected, generators, grid.rank))
    if other_partition(saved, expected):
        load_reshaped(engine, folder / tag, saved, expected, grid)
    else:
        loaded, _ = engine.load_checkpoint(str(folder), tag=tag)
        if loaded is None:
            raise ConfigError(f"{folder / tag}: DeepSpeed found nothing to load")
    if grid.rank < saved.world:
        _restore_generators(load_file(generators), grid.device)
    return saved.step


def read_fp32_state(run_dir: Path, step: int | None = None) -> dict[str, Tensor]:
    """All weights of a checkpoint in fp32 on the CPU, whatever the ZeRO stage; needs neither GPU nor ranks.

    Keys are those of TrainModule: `model.` for the towers, `heads.` for the loss heads.
    """
    saved = read_state(run_dir, step)
    folder, tag = run_dir / "checkpoints", _tag(saved.step)
    if saved.zero_stage == 0:
        # No partitions to merge: the module's own state dict is whole, and DeepSpeed's converter does not read it.
        path = folder / tag / "mp_rank_00_model_states.pt"
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return unpack_state({name: tensor.float() for name, tensor in content["module"].items()}, saved.units)
    zero_to_fp32 = importlib.import_module("deepspeed.utils.zero_to_fp32")
    state: dict[str, Tensor] = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=tag)
    return unpack_state(state, saved.units)


def _check_files(saved: SavedState, expected: SavedState, generators: Path, rank: int) -> None:
    """Of what this rank will load itself; DeepSpeed would end one rank, and leave the others waiting for it."""
    files = [generators] if rank < saved.world else []
    if not other_partition(saved, expected):
        bf16 = bool(saved.engine.get("bf16", {}).get("enabled"))
        files += files_of(generators.parent, saved.zero_stage, bf16, rank)
    for path in files:
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; expected the files of every rank of the checkpoint")


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


def _replace(path: Path, text: str) -> None:
    """Write to a temporary name, flush to the disk, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _generator_states(device: torch.device) -> dict[str, Tensor]:
    states = {"torch": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    version, internal, gauss = random.getstate()
    states["python"] = torch.tensor(internal, dtype=torch.int64)
    legacy = numpy.random.get_state(legacy=False)
    inner = legacy["state"]
    if gauss is not None or legacy["has_gauss"] or version != 3:
        raise RuntimeError("a global generator holds half of a pair of normal numbers, which is not saved")
    states["numpy"] = torch.tensor([*inner["key"].tolist(), inner["pos"]], dtype=torch.int64)
    return states


def _restore_generators(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    random.setstate((3, tuple(states["python"].tolist()), None))
    *keys, position = states["numpy"].tolist()
    numpy.random.set_state(("MT19937", numpy.array(keys, dtype=numpy.uint32), position, 0, 0.0))
