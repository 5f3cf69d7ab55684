"""The unit in which parameters are gathered: one module whose parameters are slices of two flat tensors.

ZeRO-3 does its work per parameter: a gather, a hook, a bucket copy, a reduction. A transformer block has about thirty,
so that on a fast GPU the host sets the step. A `GatherUnit` shows DeepSpeed one module without children and two
parameters, `matrices` (with weight decay) and `vectors` (without), and runs the wrapped module on views of them: the
flat-parameter scheme of FSDP (Zhao et al. 2023, arXiv 2304.11277, section 3.2.1) under DeepSpeed's partitioning.

Autograd would keep the views, and with them the gathered tensor, from the forward to the backward. So what it saves of
the flat tensors is replaced by the place in them, and read again from what is gathered when the backward comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dualforce.train.graphed import GraphPool, UnitGraph
from dualforce.train.recompute import Recompute, recomputed

FLAT = ("matrices", "vectors")
ALIGN = 64  # elements: every slice starts at 128 bytes in bf16, as fast matrix products and vector loads want


class Slot(NamedTuple):
    """Where a parameter lies in a flat tensor."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()


class GatherUnit(nn.Module):
    """`module` with its parameters in the flat parameters `matrices` and `vectors` (one is absent where it would be
    empty). Calls go to the module's forward; its training flag, names of parameters and dtype stay as they were.

    `partitioned`: the flat tensors are there during forward and backward only (ZeRO-3). `recompute`: what the backward
    computes again. `graphs`: run as CUDA graphs, where gradients are wanted and nothing waits in host memory.
    """

    def __init__(
        self,
        module: nn.Module,
        recompute: Recompute = "none",
        partitioned: bool = False,
        graphs: GraphPool | None = None,
    ) -> None:
        super().__init__()
        # Not registered: DeepSpeed must not see children, whose hooks would gather for themselves.
        self.inner: nn.Module
        object.__setattr__(self, "inner", module)
        self.layout = _layout(module)
        self._owners = {name: _owner(module, name) for slots in self.layout.values() for name, _, _ in slots}
        for flat, slots in self.layout.items():
            self.register_parameter(flat, nn.Parameter(_packed(dict(module.named_parameters()), slots)))
        for owner, attribute in self._owners.values():
            del owner._parameters[attribute]
        self._recompute: Recompute = recompute
        self._partitioned = partitioned
        self._graph = None
        if graphs is not None and recompute != "offload":
            self._graph = UnitGraph(self._run, graphs, recompute != "none", lend=partitioned)

    def forward(self, *args: Any) -> Any:
        """The wrapped module's forward."""
        if not torch.is_grad_enabled():
            return self._run(self._flats(), *args)
        if self._graph is not None and self._graph.ready(args):
            return self._graph(self._flats, args)
        policy = self._recompute
        if policy == "none" and self._graph is not None and self._graph.holds_memory:
            policy = "full"  # the first clips of a further size: see graphed.py
        if policy != "none":
            # Recomputation keeps nothing of the first forward, and what it keeps of the second dies with the backward.
            return recomputed(lambda *again: self._run(self._flats(), *again), args, policy)
        with self._places() if self._partitioned else _nothing():
            return self._run(self._flats(), *args)

    def drop_graphs(self) -> None:
        """Give up the CUDA graphs; the unit cannot run again."""
        if self._graph is not None:
            self._graph.drop()

    def _flats(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, flat) for flat in self.layout)

    def _run(self, flats: tuple[Tensor, ...], *args: Any) -> Any:
        """The wrapped module on views of `flats`."""
        try:
            for flat, slots in zip(flats, self.layout.values(), strict=True):
                gradient = _Gradient(flat, slots)
                for slot, view in zip(slots, _Views.apply(flat, gradient), strict=True):
                    owner, attribute = self._owners[slot.name]
                    owner.__dict__[attribute] = view
                    view.gradient_place = partial(gradient.place, slot)
            return self.inner(*args)
        finally:
            for owner, attribute in self._owners.values():
                owner.__dict__.pop(attribute, None)

    def _places(self) -> AbstractContextManager[None]:
        """Saved tensors that lie in a flat tensor are kept as places in it."""
        ranges = []
        for flat in self.layout:
            data = getattr(self, flat)
            ranges.append((data.data_ptr(), data.data_ptr() + data.numel() * data.element_size(), flat))

        def pack(saved: Tensor) -> Any:
            address = saved.data_ptr()
            for begin, end, flat in ranges:
                if begin <= address < end:
                    offset = (address - begin) // saved.element_size()
                    return _Place(flat, saved.shape, saved.stride(), offset)
            return saved

        def unpack(kept: Any) -> Tensor:
            if not isinstance(kept, _Place):
                return cast(Tensor, kept)
            data = getattr(self, kept.flat).detach()
            return data.as_strided(kept.shape, kept.stride, data.storage_offset() + kept.offset)

        return saved_tensors_hooks(pack, unpack)


class _Place(NamedTuple):
    flat: str
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Gradient:
    """The gradient of a flat tensor. A product that knows its slot writes there at once; the rest is copied."""

    def __init__(self, flat: Tensor, slots: list[Slot]) -> None:
        self.slots, self._numel = slots, flat.numel()
        self._like = flat.new_empty(0)
        self._room: Tensor | None = None
        self._written: set[str] = set()

    def place(self, slot: Slot) -> Tensor | None:
        """Memory for the slot's gradient; None for whoever asks a second time: autograd adds that one up."""
        if slot.name in self._written:
            return None
        self._written.add(slot.name)
        if self._room is None:
            self._room = self._like.new_empty(self._numel)
        return self._of(self._room, slot)

    def whole(self, grads: Sequence[Tensor | None]) -> Tensor | None:
        """All of it, from the gradients of the slots; a new one begins."""
        room, self._room = self._room, None
        self._written.clear()
        if room is None:
            return _joined(self.slots, grads, self._numel)
        reached = 0
        for slot, grad in zip(self.slots, grads, strict=True):
            part = self._of(room, slot)
            room[reached : slot.start].zero_()
            reached = slot.start + slot.numel
            if grad is None:
                part.zero_()
            elif grad.data_ptr() != part.data_ptr():
                part.copy_(grad)
        room[reached:].zero_()
        return room

    @staticmethod
    def _of(room: Tensor, slot: Slot) -> Tensor:
        # Of an alias: a view holds on to what it is of, and autograd copies a gradient that somebody else holds.
        room = room.detach()
        return room[slot.start : slot.start + slot.numel].view(slot.shape)


def _joined(slots: list[Slot], grads: Sequence[Tensor | None], numel: int) -> Tensor | None:
    like = next((g for g in grads if g is not None), None)
    if like is None:
        return None
    pieces, reached = [], 0
    for slot, grad in zip(slots, grads, strict=True):
        if slot.start > reached:
            pieces.append(like.new_zeros(slot.start - reached))
        pieces.append(like.new_zeros(slot.numel) if grad is None else grad.reshape(-1))
        reached = slot.start + slot.numel
    if numel > reached:
        pieces.append(like.new_zeros(numel - reached))
    return torch.cat(pieces)


class _Views(torch.autograd.Function):
    """A flat tensor -> its slots; the backward makes one flat gradient of theirs."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, gradient: _Gradient) -> tuple[Tensor, ...]:
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        data = flat.detach()
        return tuple(data[s.start : s.start + s.numel].view(s.shape) for s in gradient.slots)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        return ctx.gradient.whole(grads), None


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether weight decay applies: not to biases, norms, temperatures and modulation rows."""
    return len(shape) >= 2 and not name.endswith("modulation")


def unpack_state(state: dict[str, Tensor], layouts: dict[str, dict[str, list[Slot]]]) -> dict[str, Tensor]:
    """A state with flat tensors -> the parameters by name; `layouts` by the unit's name. KeyError for a flat tensor
    that the state lacks."""
    found: dict[str, Tensor] = {}
    for unit, layout in layouts.items():
        for flat, slots in layout.items():
            data = state[f"{unit}.{flat}"]
            for slot in slots:
                found[f"{unit}.{slot.name}"] = data[slot.start : slot.start + slot.numel].view(slot.shape)
    return found


def flat_numel(slots: list[Slot]) -> int:
    """Elements of the flat tensor of these slots, padding included."""
    end = slots[-1].start + slots[-1].numel
    return -(-end // ALIGN) * ALIGN


def layouts_of(module: nn.Module) -> dict[str, dict[str, list[Slot]]]:
    """The layouts of all units below `module`, by name."""
    return {name: unit.layout for name, unit in module.named_modules() if isinstance(unit, GatherUnit)}


def _layout(module: nn.Module) -> dict[str, list[Slot]]:
    layout: dict[str, list[Slot]] = {flat: [] for flat in FLAT}
    for name, parameter in module.named_parameters():
        shape = tuple(parameter.shape)
        slots = layout["matrices" if is_matrix(name, shape) else "vectors"]
        end = slots[-1].start + slots[-1].numel if slots else 0
        slots.append(Slot(name, shape, -(-end // ALIGN) * ALIGN))
    return {flat: slots for flat, slots in layout.items() if slots}


def _packed(parameters: dict[str, Tensor], slots: list[Slot]) -> Tensor:
    flat = parameters[slots[0].name].detach().new_zeros(flat_numel(slots))
    for slot in slots:
        flat[slot.start : slot.start + slot.numel] = parameters[slot.name].detach().flatten()
    return flat


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return module.get_submodule(path), attribute


@contextmanager
def _nothing() -> Iterator[None]:
    yield
