"""Resuming under another number of ranks or another ZeRO stage.

Each rank maps the files of all ranks of the checkpoint, copies what lies in its own share of the new partition straight
into the engine's tensors, and hands the result to DeepSpeed's own loader as if it were the file that this rank would
have written itself. So what DeepSpeed does on loading (fp32 to bf16, persistent parameters, offloaded states) is its
own work, the files on disk stay as they are, and beside its share a rank holds one whole flat parameter at most, while
what arrived is checked.

DeepSpeed's universal checkpoint was the other way. It wants every checkpoint converted first, by a program that
unpickles freely, reads each rank's file whole, writes every tensor again, and knows no stage 0; loading it with ZeRO-3,
DeepSpeed 0.19.8 silently gives all parameter groups the weight decay of the first. The functions `safe_set_full_*` do
not set Adam's step, leave ZeRO-3's bf16 weights as they were until the first step, and in stage 0 do nothing, silently;
their reading half is what the check here uses.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dualforce.config import ConfigError
from dualforce.train.agree import together
from dualforce.train.partitions import Share, Stored, read_stored, same_bits, shares_of
from megatron_ext.parallel.grid import ProcessGrid

if TYPE_CHECKING:
    from dualforce.train.checkpoint import SavedState

logger = logging.getLogger(__name__)

# How an optimizer computes, not what: this run's, never the checkpoint's.
OWN_SETTINGS = ("params", "fused", "foreach", "capturable", "differentiable")


def other_partition(saved: SavedState, expected: SavedState) -> bool:
    """Whether DeepSpeed's files of the one run are not those of the other."""
    return (saved.world, saved.zero_stage) != (expected.world, expected.zero_stage)


def describe_change(saved: SavedState, expected: SavedState) -> str | None:
    """One line that says what of the run's shape has changed, old -> new; None where nothing has."""
    values = {
        "ranks": (saved.world, expected.world),
        "sequence": (saved.sequence, expected.sequence),
        "ZeRO stage": (saved.zero_stage, expected.zero_stage),
        "micro-batch": (_batches(saved), _batches(expected)),
    }
    changed = [f"{name} {old} -> {new}" for name, (old, new) in values.items() if old != new]
    return ", ".join(changed) or None


def _batches(state: SavedState) -> str:
    return f"{state.engine['train_micro_batch_size_per_gpu']} x {state.engine['gradient_accumulation_steps']}"


def load_reshaped(engine: Any, folder: Path, saved: SavedState, expected: SavedState, grid: ProcessGrid) -> None:
    """Fill a new engine of any number of ranks from the checkpoint in `folder`; every rank calls it.

    Raises ConfigError, the same on every rank, for files that are missing or cannot be read, for optimizer states that
    DeepSpeed keeps on a disk, and where what is in the engine afterwards is not what the checkpoint holds.
    """
    stage, bf16 = expected.zero_stage, bool(saved.engine.get("bf16", {}).get("enabled"))

    def prepare() -> Stored:
        _check_settings(saved, "the checkpoint")
        _check_settings(expected, "this run")
        return read_stored(folder, saved.zero_stage, bf16, saved.world, saved.units)

    stored = together(grid, prepare)
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()
    _fill(engine, stage, stored, grid)
    if engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(stored.engine["lr_scheduler"])
    engine.global_steps, engine.skipped_steps = stored.engine["global_steps"], stored.engine["skipped_steps"]
    engine.global_samples = engine.global_steps * engine.train_batch_size()
    wrong = [*_wrong_numbers(engine, stored, saved.step), *_wrong_tensors(engine, stage, stored, grid)]

    def check() -> None:
        if wrong:
            raise ConfigError(f"{folder}: {wrong[0]} did not arrive in the engine: expected what the checkpoint holds")

    together(grid, check)
    if stage == 3:
        engine.optimizer.checkpoint_event_epilogue()


def _check_settings(state: SavedState, whose: str) -> None:
    """ConfigError for ways of keeping the optimizer's states that are not read or filled here."""
    config, zero = state.engine, state.engine.get("zero_optimization", {})
    bf16 = config.get("bf16", {}).get("enabled")
    nvme = [key for key in ("offload_optimizer", "offload_param") if (zero.get(key) or {}).get("device") == "nvme"]
    fp32_sums = config.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    wrong = [f"zero_optimization.{key}.device = nvme" for key in nvme]
    if zero.get("elastic_checkpoint"):
        wrong.append("zero_optimization.elastic_checkpoint = true")
    if state.zero_stage == 1 and bf16 and fp32_sums:  # another optimizer of DeepSpeed's
        wrong.append("zero_optimization.stage = 1 with bf16.enabled and data_types.grad_accum_dtype = fp32")
    if state.zero_stage == 0 and bf16 and state.optimizer.endswith(".FusedAdam"):  # likewise
        wrong.append(f"zero_optimization.stage = 0 with bf16.enabled and {state.optimizer}")
    if wrong:
        raise ConfigError(f"DeepSpeed file: {whose} has {wrong[0]}: expected equal ranks and ZeRO stage to resume on")


def _fill(engine: Any, stage: int, stored: Stored, grid: ProcessGrid) -> None:
    """Give the engine's optimizer the state dict that it would have saved itself, with the stored values in it."""
    optimizer = engine.optimizer
    content = optimizer.state_dict()  # its tensors are the engine's own
    name = {0: "optimizer_state_dict", 3: "optimizer_state_dict"}.get(stage, "base_optimizer_state")
    base = content.get(name, content)
    shares = shares_of(engine, stage)
    base["state"] = {i: _state(share, stored) for i, share in enumerate(shares)}
    for own, old in zip(base["param_groups"], stored.groups, strict=True):
        own.update({key: value for key, value in old.items() if key not in OWN_SETTINGS})
    if stage == 0:
        optimizer.load_state_dict(content)
        parameters = dict(engine.module.named_parameters())
        for share in shares:
            parameters[share.pieces[0].name].data.copy_(share.weights)
        return
    optimizer.load_state_dict([content] * grid.world, load_from_fp32_weights=True)
    if stage < 3:
        optimizer.update_lp_params()


def _state(share: Share, stored: Stored) -> dict[str, Any]:
    """Write the share's weights into the engine and return the optimizer's state of them."""
    moments = {key: torch.zeros_like(share.weights) for key in stored.keys}
    for key, target in ((None, share.weights), *moments.items()):
        for piece in share.pieces:
            stored.copy_to(target, piece, key)
    scalars = {key: value.clone() if isinstance(value, Tensor) else value for key, value in stored.scalars.items()}
    return scalars | moments


def _wrong_numbers(engine: Any, stored: Stored, step: int) -> list[str]:
    """The step count, hyperparameters and optimizer steps of the engine that are not those of the checkpoint."""
    pairs = [("the step count", engine.global_steps, step)]
    for group, old in zip(engine.basic_optimizer.param_groups, stored.groups, strict=True):
        pairs += [(key, group[key], value) for key, value in old.items() if key not in OWN_SETTINGS]
    for state in engine.basic_optimizer.state.values():
        pairs += [(key, state[key], value) for key, value in stored.scalars.items()]
    plain = [(key, *(x.item() if isinstance(x, Tensor) else x for x in values)) for key, *values in pairs]
    return [f"{key} ({old}, not {new})" for key, new, old in plain if new != old]


def _wrong_tensors(engine: Any, stage: int, stored: Stored, grid: ProcessGrid) -> list[str]:
    """Flat parameters whose fp32 weights, moments or computing copies in the engine are not, bit for bit, those of the
    checkpoint. DeepSpeed gathers each, one at a time; the ranks take turns in comparing with the files. Collective."""
    wrong, read = [], _reader(engine, stage)
    for i, (name, parameter) in enumerate(engine.module.named_parameters()):
        mine = stage == 0 or i % grid.world == grid.rank  # without ZeRO every rank has all, and checks all
        for key in (None, *stored.keys):
            whole = read(name, parameter, key)
            if mine and not stored.equal(name, key, whole):
                wrong.append(f"{key or 'fp32 weights'} of {name}")
            if key is None and not _computes_with(parameter, whole, stage):
                wrong.append(f"weights of {name}")
            del whole
    return wrong


def _reader(engine: Any, stage: int) -> Callable[[str, nn.Parameter, str | None], Tensor]:
    """Reads a parameter's whole fp32 weights (key None) or a moment of them from the engine; collective."""
    if stage == 0:
        states = engine.basic_optimizer.state_dict()["state"]
        held = {share.pieces[0].name: {None: share.weights} | states[i] for i, share in enumerate(shares_of(engine, 0))}
        return lambda name, parameter, key: held[name][key]
    access = importlib.import_module("deepspeed.utils")
    if stage < 3:
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # as DeepSpeed does in its first step

    def read(name: str, parameter: nn.Parameter, key: str | None) -> Tensor:
        found: Tensor = (
            access.safe_get_full_fp32_param(parameter)
            if key is None
            else access.safe_get_full_optimizer_state(parameter, key)
        )
        return found

    return read


def _computes_with(parameter: nn.Parameter, whole: Tensor, stage: int) -> bool:
    """Whether forward will see these fp32 weights, in its own dtype; collective with ZeRO-3."""
    if stage < 3:
        return same_bits(parameter.detach(), whole.to(parameter.dtype))
    zero = importlib.import_module("deepspeed").zero
    with zero.GatheredParameters([parameter]):
        return same_bits(parameter.detach(), whole.to(parameter))
