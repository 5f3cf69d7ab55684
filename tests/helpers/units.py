"""States of gather units from states by name."""

from __future__ import annotations

from torch import Tensor

from dualforce.train.gather_unit import ALIGN, Slot


def pack_state(state: dict[str, Tensor], layouts: dict[str, dict[str, list[Slot]]]) -> dict[str, Tensor]:
    """The inverse of `unpack_state`; gaps are zero."""
    found = {}
    for unit, layout in layouts.items():
        for flat, slots in layout.items():
            end = slots[-1].start + slots[-1].numel
            data = state[f"{unit}.{slots[0].name}"].new_zeros(-(-end // ALIGN) * ALIGN)
            for slot in slots:
                data[slot.start : slot.start + slot.numel] = state[f"{unit}.{slot.name}"].flatten()
            found[f"{unit}.{flat}"] = data
    return found
