"""Checkpoints of published networks: plain tensors out of a file, and into a module. Nothing in a file is executed."""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dualforce.codecs.protocols import CodecError

DIGEST_DIGITS = 12
DEPTH = 4  # of objects in objects in which tensors are looked for
SHOWN = 3  # keys in a message


class Checkpoint(NamedTuple):
    """Tensors by their full name (names of nested objects joined by dots), and the first digits of the file's sha256,
    which tell two checkpoints apart in a tag."""

    path: Path
    tensors: dict[str, Tensor]
    digest: str

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with `prefix`, named without it."""
        return {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}


def read_checkpoint(path: Path) -> Checkpoint:
    """The tensors of a safetensors file, or of what `torch.save` wrote.

    Values of other kinds beside the tensors are left out. Raises CodecError for a file that is not there, damaged, or
    made of more than tensors, plain values and containers: code in it is refused, not run.
    """
    if not path.is_file():
        raise CodecError(f"{path}: not a file: expected a checkpoint (.pth, .tar, .ckpt or .safetensors)")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()[:DIGEST_DIGITS]
        content = load_file(path) if path.suffix == ".safetensors" else _torch_content(path)
    except CodecError:
        raise
    except Exception as error:  # of any kind: what readers of two formats make of a damaged or foreign file
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise CodecError(f"{path}: {cause}: expected a checkpoint of plain tensors") from None
    tensors = dict(_flat(content, "", DEPTH, set()))
    if not tensors:
        raise CodecError(f"{path}: no tensors in it: expected a checkpoint")
    return Checkpoint(path, tensors, digest)


def fill(module: nn.Module, tensors: Mapping[str, Tensor], path: Path, prefix: str) -> None:
    """Give a module (made on the device "meta") copies of exactly its weights, on the CPU, for inference.

    Names are the module's own; `prefix` is what the file has before them. Raises CodecError naming the first key that
    is missing, unknown, of another shape or kind, or not finite.
    """
    expected = module.state_dict()
    for kind, many, few in (("missing", expected, tensors), ("unknown", tensors, expected)):
        lone = [name for name in many if name not in few]
        if lone:
            wanted = f"the {len(expected)} keys of the published file"
            raise CodecError(f"{path}: {prefix}{lone[0]}: {kind} ({len(lone)} such): expected {wanted}")
    values = {name: _value(tensors[name], like, f"{path}: {prefix}{name}") for name, like in expected.items()}
    module.load_state_dict(values, assign=True)
    module.requires_grad_(False).eval()


def named(tensors: Mapping[str, Tensor]) -> str:
    """Some of the names, for a message."""
    names = sorted(tensors)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN])[:200] + more


def _value(found: Tensor, like: Tensor, where: str) -> Tensor:
    # Shape and place first: a file of a few bytes can hold a tensor that claims any size.
    if found.shape != like.shape:
        raise CodecError(f"{where}: shape {list(found.shape)}: expected {list(like.shape)}")
    plain = found.layout == torch.strided and not found.is_quantized and found.device.type == "cpu"
    if not plain or found.is_floating_point() != like.is_floating_point() or found.is_complex():
        raise CodecError(f"{where}: {found.dtype}, {found.layout} on {found.device}: expected plain {like.dtype}")
    value = found.to(like.dtype, copy=True).contiguous()
    if not bool(torch.isfinite(value).all()):
        raise CodecError(f"{where}: NaN or infinity: expected finite weights")
    return value


def _torch_content(path: Path) -> object:
    packed = zipfile.is_zipfile(path)
    check_packing(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch thinks of the age of a file
        # Mapped, so that parts of a checkpoint that are not used are not read.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=packed)


def check_packing(path: Path) -> None:
    """Raise CodecError for an archive that unpacks to more than it is: torch stores tensors as they are. (An older file
    of torch is none.)"""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    packed = next((member for member in members if member.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None or sum(member.file_size for member in members) > path.stat().st_size:
        raise CodecError(f"{path}: members are compressed or overlap: expected a checkpoint as torch.save writes it")


def _flat(value: object, name: str, depth: int, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping) and depth and id(value) not in seen:
        seen.add(id(value))  # an object that is in many places would be gone through as often, and so on inside it
        for key, inner in value.items():
            if isinstance(key, str):
                yield from _flat(inner, f"{name}.{key}" if name else key, depth - 1, seen)
