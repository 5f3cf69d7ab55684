"""The devices that workers compute on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dualforce.preprocess.errors import BuildError


def kind_of_devices(names: Sequence[str]) -> str:
    """What the devices are, all being of one kind: "cpu", or "cuda" and the name of the GPU.

    Results differ between kinds in their last bits, so a build uses one. Raises BuildError for a name that is no
    device, a device that is not here, one given twice, and for two kinds.
    """
    if not names:
        raise BuildError("--devices: none: expected cpu, or cuda:0 and the like, separated by commas")
    kinds = {name: _kind(name) for name in names}
    if len(kinds) < len(names):
        raise BuildError(f"--devices {','.join(names)}: one occurs twice: expected each once (--workers says how many)")
    first = names[0]
    for name, kind in kinds.items():
        if kind != kinds[first]:
            raise BuildError(
                f"--devices {name}: {kind}: expected {kinds[first]} as {first} is, since results would depend on which "
                "device a video falls to"
            )
    return kinds[first]


def deal(names: Sequence[str], workers: int) -> list[str]:
    """The device of every worker, in turn."""
    return [names[number % len(names)] for number in range(workers)]


def _kind(name: str) -> str:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BuildError(f"--devices {name!r}: expected cpu, or cuda:0 and the like, separated by commas") from None
    if device.type == "cpu" and device.index is None:
        return "cpu"
    if device.type != "cuda" or device.index is None:
        raise BuildError(f"--devices {name!r}: expected cpu, or cuda:0 and the like, separated by commas")
    count = torch.cuda.device_count()
    if device.index >= count:
        found = f"cuda:0 to cuda:{count - 1}" if count else "cpu, as no CUDA GPU is available here"
        raise BuildError(f"--devices {name}: no such device: expected {found}")
    return f"cuda {torch.cuda.get_device_name(device.index)}"
