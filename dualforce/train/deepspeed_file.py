"""What may be in a DeepSpeed file. DeepSpeed ignores top-level keys that it does not know, and ends with a traceback,
or several lines without the file's name, for most of what it cannot use; so it is judged before."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dualforce.config import ConfigError, Section, validate
from dualforce.config_errors import describe

# AdamW's further settings: DeepSpeed's choice of an implementation, and those of its own.
ADAM_SETTINGS = ("torch_adam", "adam_w_mode", "bias_correction", "set_grad_none", "fp32_optimizer_states")
ADAM = ("adam", "adamw")
OPTIMIZERS = (*ADAM, "adagrad", "lamb", "lion", "muadam", "muadamw", "musgd", "muon")


class _Switch(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    enabled: bool = False


class _Named(Section):
    type: str
    params: dict[str, Any] = Field(default_factory=dict)


class _DataTypes(Section):
    grad_accum_dtype: Literal["auto", "fp32", "bf16"] | None = None


class DeepSpeedFile(Section):
    """Keys that the trainer hands on. Of DeepSpeed's others, some (pipelines, curricula, its own checkpoint writers)
    are not what this trainer does, and some divide gradients otherwise than losses/total.py has it."""

    train_batch_size: Any = "auto"
    train_micro_batch_size_per_gpu: Any = "auto"
    gradient_accumulation_steps: Any = "auto"
    gradient_clipping: float = Field(default=0.0, ge=0)
    zero_optimization: dict[str, Any] = Field(default_factory=dict)
    optimizer: _Named
    scheduler: _Named | None = None
    bf16: _Switch = _Switch()
    fp16: _Switch = _Switch()
    data_types: _DataTypes = _DataTypes()
    communication_data_type: Any = None
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True
    aio: dict[str, Any] = Field(default_factory=dict)
    steps_per_print: int | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    disable_python_gc: bool = False
    comms_logger: Any = None
    flops_profiler: Any = None
    timers: Any = None
    log_level: Any = None


def check_deepspeed_file(path: Path, config: Mapping[str, Any]) -> None:
    """Judge the content of the DeepSpeed file at `path`, with its batch keys filled in or not.

    Raises ConfigError with the file, the key, the value and what was expected.
    """
    file = validate(DeepSpeedFile, config, str(path))
    _check_zero(path, file.zero_optimization)
    _check_optimizer(path, file.optimizer)
    if file.scheduler is not None:
        _check_scheduler(path, file.scheduler)


def _check_zero(path: Path, section: dict[str, Any]) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**section)
    except ValidationError as error:
        raise ConfigError(f"{path}: zero_optimization: {describe(error, DeepSpeedZeroConfig)}") from None


def _check_optimizer(path: Path, section: _Named) -> None:
    if section.type.lower() not in OPTIMIZERS and not hasattr(torch.optim, section.type):
        raise ConfigError(f'{path}: optimizer.type = "{section.type}": expected AdamW, or another that DeepSpeed knows')
    rate = section.params.get("lr", 0.0)
    if isinstance(rate, bool) or not isinstance(rate, int | float) or rate < 0:
        raise ConfigError(f"{path}: optimizer.params.lr = {rate!r}: expected a number, 0 or more")
    if section.type.lower() in ADAM:
        known = [*inspect.signature(torch.optim.AdamW).parameters, *ADAM_SETTINGS]
        _check_names(path, "optimizer.params", section.params, known)


def _check_scheduler(path: Path, section: _Named) -> None:
    from deepspeed.runtime import lr_schedules

    if section.type not in lr_schedules.VALID_LR_SCHEDULES and not hasattr(torch.optim.lr_scheduler, section.type):
        names = ", ".join(lr_schedules.VALID_LR_SCHEDULES)
        raise ConfigError(f'{path}: scheduler.type = "{section.type}": expected one of {names}')
    kind = getattr(lr_schedules, section.type, None) or getattr(torch.optim.lr_scheduler, section.type)
    _check_names(path, "scheduler.params", section.params, list(inspect.signature(kind).parameters))


def _check_names(path: Path, key: str, given: Mapping[str, Any], known: list[str]) -> None:
    settings = [name for name in known if name not in ("self", "params", "optimizer")]
    for name in given:
        if name not in settings:
            near = difflib.get_close_matches(name, settings, n=1, cutoff=0.5)
            hint = f"did you mean {key}.{near[0]}?" if near else f"expected one of {', '.join(settings)}"
            raise ConfigError(f"{path}: unknown key {key}.{name} = {given[name]!r}; {hint}")
