"""CUDA graphs of gather units: a layer's forward is one launch, its backward another, whatever is inside.

A layer of both towers is some three hundred launches, which cost the host more than they cost a fast GPU. So after a
few ordinary steps a unit's forward and backward are captured (CUDA graphs; the scheme of
torch.cuda.make_graphed_callables) and from then on replayed. What a graph reads and writes has fixed addresses:

- flat parameters: ZeRO-3 gathers them anywhere, so they are copied to one place that all units share;
- inputs: copied to fixed places, except where one already is the fixed output of the unit before;
- outputs, input gradients: fixed, valid until the next replay. So are gradients of flat parameters under ZeRO-3, which
  reduces them before the next backward; who keeps them longer, to add up, is handed copies.

All graphs share one memory pool. They must be replayed in the order of their capture, forward through the layers and
back, which is the order of every training step.

Clips of several sizes have graphs of their own, in the same memory: no two of a step differ, and what a forward left
for its backward is not needed in the next step. The largest should come first, as others find room in what it took
piece by piece. Before a further size is captured its few ordinary passes would need that memory a second time, outside
the pool: they keep the layers' inputs only and compute the rest again.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

WARM_UP = 2  # ordinary passes before a unit is captured: kernels compile, DeepSpeed learns the order of the units
MAX_KINDS = 16  # sizes of clips with graphs; each keeps its inputs, outputs and input gradients

ResultT = TypeVar("ResultT")
Tensors = tuple[Tensor, ...]


class Recording(Protocol):
    """A piece of work that is recorded once and repeated on the same memory."""

    def record(self, work: Callable[[], ResultT]) -> ResultT: ...

    def repeat(self) -> None: ...

    def drop(self) -> None: ...


class _CudaRecording:
    def __init__(self, stream: torch.cuda.Stream, handle: Any) -> None:
        self._stream, self._handle = stream, handle
        self._graph = torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], ResultT]) -> ResultT:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            # Other threads (NCCL's watchdog, the reader) go on with their own CUDA calls meanwhile.
            self._graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
            try:
                result = work()
            except BaseException:
                with contextlib.suppress(RuntimeError):  # of a capture that the first error has spoilt
                    self._graph.capture_end()
                raise
            self._graph.capture_end()
        current.wait_stream(self._stream)
        return result

    def repeat(self) -> None:
        self._graph.replay()

    def drop(self) -> None:
        self._graph.reset()


class GraphPool:
    """What the graphs of a run share: memory, places for flat parameters and inputs, and which places are whose."""

    def __init__(self, recording: Callable[[], Recording] | None = None) -> None:
        self._make = recording
        self._places: dict[Any, Tensor] = {}
        self.fixed: dict[int, Tensor] = {}  # outputs and input gradients of graphs, by address
        self._turns = itertools.count()
        self._kinds = 0

    def turn(self) -> int:
        """0 and 1 for units that follow each other."""
        return next(self._turns) % 2

    def recording(self) -> Recording:
        """A new one, in this pool's memory."""
        if self._make is None:
            stream, handle = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            self._make = lambda: _CudaRecording(stream, handle)
        return self._make()

    def make_room(self, kind: int) -> None:
        """Called by each unit before it captures its `kind`-th size of clips: what ordinary steps left in the
        allocator's cache would not fit beside the graphs' own memory."""
        if kind == self._kinds and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()
        self._kinds = max(self._kinds, kind + 1)

    def place(self, name: Any, like: Tensor) -> Tensor:
        """A tensor of fixed address with the shape of `like`, the same for every unit that asks by this name."""
        key = (name, like.dtype)
        room = self._places.get(key)
        if room is None or room.numel() < like.numel():
            # A larger one takes over; graphs that hold the smaller keep it alive.
            self._places[key] = room = like.new_empty(like.numel())
        return room[: like.numel()].view(like.shape)

    def place_or_fixed(self, name: Any, tensor: Tensor) -> Tensor:
        """Where a graph will find `tensor`: where it is, if a graph wrote it, else a place."""
        known = self.fixed.get(tensor.data_ptr())
        if known is not None and known.shape == tensor.shape and known.stride() == tensor.stride():
            return known
        return self.place(name, tensor)

    def fix(self, tensors: Sequence[Tensor | None]) -> None:
        """Remember what a graph writes."""
        self.fixed |= {tensor.data_ptr(): tensor for tensor in tensors if tensor is not None}


class UnitGraph:
    """Runs `run(flats, *args)` as it is at first and as graphs from then on, for each kind of arguments (shapes, types,
    constants) that comes often enough. What comes after `MAX_KINDS` of them runs as it is. `lend`: gradients of `flats`
    are handed out where the graph writes them, to be read before the next backward."""

    def __init__(self, run: Callable[..., Any], pool: GraphPool, recompute: bool, lend: bool) -> None:
        self._run, self._pool, self._recompute, self._lend = run, pool, recompute, lend
        self._seen: dict[Any, tuple[int, Any]] = {}  # count, and the arguments' constants, so that no id is used again
        self._captured: dict[Any, _Captured] = {}
        self._told = False

    @property
    def holds_memory(self) -> bool:
        """Whether graphs hold the memory of a pass already."""
        return bool(self._captured)

    def ready(self, args: tuple[Any, ...]) -> bool:
        """Whether the next call with such arguments is a graph's; counts the call otherwise."""
        kind = _kind(args)
        if kind in self._captured:
            return True
        if len(self._captured) >= MAX_KINDS:
            if not self._told:
                self._told = True
                logger.info("a layer got clips of more than %d sizes: the last to come run without graphs", MAX_KINDS)
            return False
        count = self._seen.get(kind, (0, None))[0] + 1
        self._seen[kind] = (count, _without_tensors(args))
        return count > WARM_UP

    def __call__(self, flats: Callable[[], Tensors], args: tuple[Any, ...]) -> Any:
        """`flats` gives the flat parameters as they are now, in the forward and again in the backward."""
        kind = _kind(args)
        if kind not in self._captured:
            self._pool.make_room(len(self._captured))
            self._captured[kind] = _Captured(self._run, self._pool, args, self._recompute, self._lend)
        return _Replayed.apply(self._captured[kind], flats, *flats(), *_tensors(args))

    def drop(self) -> None:
        """Give up the graphs; the unit cannot run again."""
        for captured in self._captured.values():
            captured.drop()


class _Captured:
    """The two graphs of a unit and the tensors that they were recorded with."""

    def __init__(
        self, run: Callable[..., Any], pool: GraphPool, args: tuple[Any, ...], recompute: bool, lend: bool
    ) -> None:
        self._run, self._pool, self._recompute, self._lend = run, pool, recompute, lend
        self._args = _without_tensors(args)
        self._turn = pool.turn()
        self._forward: Recording | None = None
        self._backward: Recording | None = None
        self._flats: _Places = _Places((), ())
        self._inputs: _Places = _Places((), ())
        self._out: Tensors = ()
        self._above: Tensors = ()  # gradients of the outputs
        self._below: tuple[Tensor | None, ...] = ()  # gradients of flats and inputs
        self._rooms: Sequence[Tensor] = ()  # for the latter, where units share them

    def forward(self, flats: Tensors, inputs: Tensors) -> Tensors:
        if self._forward is None:
            self._flats = _places([self._pool.place(("flat", i), x) for i, x in enumerate(flats)], flats)
            # Places of its own: the backward reads them again, after other units have been loaded.
            found = [self._pool.place_or_fixed(("input", id(self), i), x) for i, x in enumerate(inputs)]
            self._inputs = _places(found, inputs)
        _load([*self._flats.rooms, *self._inputs.rooms], [*flats, *inputs])
        if self._forward is None:
            self._forward = self._pool.recording()
            self._out = self._forward.record(self._work)
            self._pool.fix([out.detach() for out in self._out])
        self._forward.repeat()
        return tuple(out.detach() for out in self._out)

    def backward(self, flats: Tensors, above: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        given = [torch.zeros_like(out) if grad is None else grad for grad, out in zip(above, self._out, strict=True)]
        if self._backward is None:
            if self._recompute:
                names = [("below", self._turn, i, x.shape) for i, x in enumerate(self._inputs.rooms)]
                self._rooms = [self._pool.place(*pair) for pair in zip(names, self._inputs.rooms, strict=True)]
            self._above = tuple(
                self._pool.place_or_fixed(("gradient", i, x.shape), x.contiguous()) for i, x in enumerate(given)
            )
        # Another unit's parameters lie in the shared place by now.
        _load([*self._flats.rooms, *self._above], [*flats, *given])
        if self._backward is None:
            self._backward = self._pool.recording()
            self._below = self._backward.record(self._gradients)
            self._out = tuple(out.detach() for out in self._out)  # ends the life of what the forward had saved
            self._pool.fix(self._below[len(flats) :])
        self._backward.repeat()
        below = [None if grad is None else grad.detach() for grad in self._below]
        own = [grad if grad is None or self._lend else grad.clone() for grad in below[: len(flats)]]
        return (*own, *below[len(flats) :])

    def drop(self) -> None:
        for recording in (self._forward, self._backward):
            if recording is not None:
                recording.drop()

    def _work(self) -> Tensors:
        # With gradients also where they are thrown away: the same kernels as in the passes before, compiled by now.
        with torch.enable_grad():
            out = self._run(self._flats.leaves, *_with(self._args, iter(self._inputs.leaves)))
        return tuple(one.detach() for one in out) if self._recompute else tuple(out)

    def _gradients(self) -> tuple[Tensor | None, ...]:
        out = self._out
        if self._recompute:
            with torch.enable_grad():
                out = tuple(self._run(self._flats.leaves, *_with(self._args, iter(self._inputs.leaves))))
        leaves = [*self._flats.leaves, *self._inputs.leaves]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        pairs = [(one, grad) for one, grad in zip(out, self._above, strict=True) if one.requires_grad]
        found = iter(
            torch.autograd.grad([one for one, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True)
        )
        below = [next(found) if leaf.requires_grad else None for leaf in leaves]
        if self._recompute:
            # Where memory counts, the inputs' gradients do not live on in every unit: two places serve all by turns,
            # one that is written and the one that the unit below has just read.
            first = len(self._flats.leaves)
            for i, room in enumerate(self._rooms, start=first):
                grad = below[i]
                below[i] = None if grad is None else room.copy_(grad)
        return tuple(below)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, captured: _Captured, flats: Callable[[], Tensors], *tensors: Tensor) -> Tensors:
        ctx.captured, ctx.flats = captured, flats
        ctx.set_materialize_grads(False)
        count = len(flats())
        return captured.forward(tensors[:count], tensors[count:])

    @staticmethod
    def backward(ctx: Any, *above: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, *ctx.captured.backward(ctx.flats(), above))


class _Places(NamedTuple):
    """Tensors of fixed address, and the same memory as leaves of the recorded graph. A leaf has a version of its own:
    loading a place does not make autograd think that what it saved has changed, and it has not, in its time."""

    rooms: Tensors
    leaves: Tensors


def _places(rooms: Sequence[Tensor], like: Sequence[Tensor]) -> _Places:
    leaves = [room.data.requires_grad_(x.requires_grad) for room, x in zip(rooms, like, strict=True)]
    return _Places(tuple(rooms), tuple(leaves))


def _load(rooms: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copy what is not where it should be."""
    moves = [(a, b) for a, b in zip(rooms, tensors, strict=True) if a.data_ptr() != b.data_ptr()]
    if moves:
        torch._foreach_copy_([room for room, _ in moves], [tensor.detach() for _, tensor in moves])


def _tensors(args: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, in order; other objects are constants of the graph."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from _tensors(arg)


def _with(args: Any, tensors: Iterator[Tensor]) -> tuple[Any, ...]:
    """`args` with its tensors replaced in order."""
    items = [next(tensors) if isinstance(a, Tensor) else _with(a, tensors) if isinstance(a, tuple) else a for a in args]
    return type(args)(*items) if hasattr(args, "_fields") else tuple(items)


def _without_tensors(args: Any) -> tuple[Any, ...]:
    """`args` with an empty tensor for each of theirs."""
    return _with(args, itertools.repeat(torch.empty(0)))


def _kind(args: Any) -> tuple[Any, ...]:
    """What a graph depends on: shapes and types of tensors, identity of constants."""
    return tuple(
        (arg.shape, arg.dtype, arg.requires_grad)
        if isinstance(arg, Tensor)
        else _kind(arg) if isinstance(arg, tuple) else id(arg)
        for arg in args
    )  # fmt: skip
