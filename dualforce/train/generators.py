"""The states of the global random generators of a rank, as tensors."""

from __future__ import annotations

import random

import numpy
import torch
from torch import Tensor


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """Of Python, NumPy, torch and the GPU: [N] each. RuntimeError where one holds half of a pair of normal numbers."""
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


def restore_generators(states: dict[str, Tensor], device: torch.device) -> None:
    """Go on from what `generator_states` returned."""
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    random.setstate((3, tuple(states["python"].tolist()), None))
    *keys, position = states["numpy"].tolist()
    numpy.random.set_state(("MT19937", numpy.array(keys, dtype=numpy.uint32), position, 0, 0.0))
