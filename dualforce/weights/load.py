"""Reading a model folder back into a DualTower: strict in names, shapes and files."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dualforce.config import ModelConfig, validate
from dualforce.config_file import read_json
from dualforce.model.dual_tower import DualTower
from dualforce.weights.export import CONFIG_FILE, FORMAT, FORMAT_VERSION, INDEX_FILE, SINGLE_FILE
from dualforce.weights.keys import Rule, Shape, WeightsError, check_names, key_table
from megatron_ext.kernels.kernel_set import KernelSet, select_kernels

CONFIG_KEYS = ("model", "extractors", "statistics", "geometry", "noise")


class LoadedModel(NamedTuple):
    """A model ready to run, and its folder's config."""

    model: DualTower
    config: dict[str, Any]


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a model folder; raises WeightsError (or ConfigError) in one line when it is not one."""
    path = folder / CONFIG_FILE
    config = read_json(path)
    for key, value in (("format", FORMAT), ("version", FORMAT_VERSION)):
        if config.get(key) != value:
            raise WeightsError(f"{path}: {key} = {config.get(key)!r}: expected {value!r}")
    for key in CONFIG_KEYS:
        if not isinstance(config.get(key), dict):
            raise WeightsError(f"{path}: key {key} is missing: expected an object")
    for stream in ("video", "motion", "audio"):
        extractor = config["extractors"].get(stream)
        if not isinstance(extractor, dict) or not isinstance(extractor.get("tag"), str):
            raise WeightsError(f"{path}: extractors.{stream} = {extractor!r}: expected an object with a tag")
    return config


def load_model(
    folder: Path, device: torch.device, dtype: torch.dtype, kernels: str | KernelSet = "auto"
) -> LoadedModel:
    """The model of `folder` on `device` in `dtype`, in evaluation mode without gradients, and its config.

    Raises WeightsError in one line for a missing or damaged file, a key too many or too few, or a wrong shape.
    """
    config = read_config(folder)
    model_config = validate(ModelConfig, config["model"], f"{folder / CONFIG_FILE}: model")
    chosen = select_kernels(kernels, device, dtype, model_config.head_dims) if isinstance(kernels, str) else kernels
    with torch.device("meta"):
        model = DualTower(model_config, chosen)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state = _read_state(folder, key_table(model_config), shapes, device, dtype)
    model.load_state_dict(state, strict=True, assign=True)
    return LoadedModel(model.eval().requires_grad_(False), config)


def _read_state(
    folder: Path, table: list[Rule], shapes: Mapping[str, Shape], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Inner state, one parameter at a time from the files to the device."""
    where = _weight_map(folder)
    check_names(list(where), [name for rule in table for name in rule.public], str(folder))
    with ExitStack() as stack:
        files = {name: stack.enter_context(_opened(folder / name)) for name in sorted(set(where.values()))}

        def read(name: str, shape: Shape) -> Tensor:
            path = folder / where[name]
            tensor = _tensor(files[where[name]], name, path)
            if tuple(tensor.shape) != shape:
                raise WeightsError(f"{path}: {name} has shape {list(tensor.shape)}: expected {list(shape)}")
            return tensor.to(device, dtype)

        state = {}
        for rule in table:
            shape = shapes[rule.inner]
            parts = [read(name, rule.public_shape(shape)) for name in rule.public]
            state[rule.inner] = rule.to_inner(parts, shape)
        return state


def _weight_map(folder: Path) -> dict[str, str]:
    """Public name -> file name, from the index or the single file."""
    index = folder / INDEX_FILE
    if index.exists():
        found = read_json(index).get("weight_map")
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
            raise WeightsError(f"{index}: key weight_map is missing: expected tensor names with their files")
        outside = [name for name in found.values() if Path(name).name != name]
        if outside:
            raise WeightsError(f"{index}: weight_map names {outside[0]!r}: expected a file in the same folder")
        return found
    with _opened(folder / SINGLE_FILE) as file:
        return dict.fromkeys(file.keys(), SINGLE_FILE)


def _opened(path: Path) -> Any:
    """An open safetensors file; WeightsError when it is missing or damaged."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such file: expected the weights of the model folder")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: cannot be read as safetensors ({error})") from None


def _tensor(file: Any, name: str, path: Path) -> Tensor:
    try:
        tensor = file.get_tensor(name)
    except SafetensorError as error:
        raise WeightsError(f"{path}: {name} is not in the file that the index names ({error})") from None
    if not tensor.is_floating_point():
        raise WeightsError(f"{path}: {name} has dtype {tensor.dtype}: expected a floating-point dtype")
    return tensor
