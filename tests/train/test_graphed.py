"""The book-keeping of graphed units, with recordings that run again on the same memory; CUDA's are in tests/gpu."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dualforce.train.gather_unit import GatherUnit
from dualforce.train.graphed import WARM_UP, GraphPool


class Shared(NamedTuple):
    rows: Tensor
    text: Tensor


class Layer(nn.Module):
    """Two streams, inputs that all layers share, a constant."""

    def __init__(self, whole: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(4, 4)
        self.whole = whole
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor, y: Tensor, shared: Shared, factor: list[float]) -> tuple[Tensor, Tensor]:
        mixed = y + factor[0] * x[:, :4] * shared.text
        first = torch.tanh(self.a(x) * self.scale + shared.rows) + x
        return (first, torch.tanh(self.b(mixed))) if self.whole else (first, y)  # a depth that one tower lacks


class Again:
    """Stands for a CUDA graph: `repeat` does the work anew and writes the results where the first ones are."""

    count = 0
    dropped = 0

    def record(self, work: Callable[[], Any]) -> Any:
        self.work, self.owner = work, work.__self__  # type: ignore[attr-defined]
        self.results, self.first = work(), True
        return self.results

    def drop(self) -> None:
        Again.dropped += 1

    def repeat(self) -> None:
        Again.count += 1
        if self.first:  # the recording itself did the work
            self.first = False
            return
        static = self.owner._out
        if self.work.__name__ == "_gradients" and not self.owner._recompute:
            self.owner._out = self.owner.fresh
        new = self.work()
        self.owner._out = static
        if self.work.__name__ == "_work":
            self.owner.fresh = new
        with torch.no_grad():
            for old, one in zip(self.results, new, strict=True):
                if old is not None:
                    old.data.copy_(one)


FACTOR = [0.7]  # a constant of the graph: which list, not what is in it


def run(
    layers: list[nn.Module], step: int, batch: int = 3, factor: list[float] = FACTOR
) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of the inputs of one step; parameters keep theirs."""
    source = torch.Generator().manual_seed(step)
    x, y, rows, text = (torch.randn(batch, n, generator=source) for n in (6, 4, 6, 4))
    leaves = [x, y, rows.requires_grad_(), text.requires_grad_()]
    x.requires_grad_()
    out = (x * 1.0, y * 1.0)  # what comes first is not a graph's
    for layer in layers:
        out = layer(*out, Shared(rows * 2.0, text * 1.0), factor)
    loss = (out[0] * out[0]).sum() + out[1].sum()
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


def made(recompute: Any, depth: int = 3) -> tuple[list[nn.Module], list[GatherUnit]]:
    torch.manual_seed(1)
    plain = [Layer(i < 3) for i in range(depth)]
    pool = GraphPool(Again)
    torch.manual_seed(1)
    return plain, [GatherUnit(Layer(i < 3), recompute, partitioned=True, graphs=pool) for i in range(depth)]


def captured_of(unit: GatherUnit) -> Any:
    """The graphs of a unit that has them for one size."""
    assert unit._graph is not None
    (found,) = unit._graph._captured.values()
    return found


def move(units: list[GatherUnit]) -> None:
    """Flat parameters are gathered to new addresses all the time."""
    for unit in units:
        for parameter in unit.parameters():
            parameter.data = torch.cat((torch.zeros(8), parameter.data))[8:]


@pytest.mark.parametrize("depth", [3, 5])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_replayed_steps_equal_ordinary_ones(recompute: Any, depth: int) -> None:
    plain, units = made(recompute, depth)
    Again.count = 0
    for step in range(WARM_UP + 4):
        move(units)
        wanted, found = run(plain, step), run(list(units), step)
        assert torch.equal(wanted[0], found[0]), step
        for a, b in zip(wanted[1], found[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        for layer, unit in zip(plain, units, strict=True):
            own = dict(layer.named_parameters())
            for flat, slots in unit.layout.items():
                gradient = getattr(unit, flat).grad
                for slot in slots:
                    part = gradient[slot.start : slot.start + slot.numel].view(slot.shape)
                    if own[slot.name].grad is None:  # not used at this depth
                        assert not part.any()
                        continue
                    torch.testing.assert_close(part, own[slot.name].grad, rtol=1e-5, atol=1e-6)
        with torch.no_grad():  # an optimizer step: replays must see the new values
            for layer, unit in zip(plain, units, strict=True):
                for flat, slots in unit.layout.items():
                    parameter = getattr(unit, flat)
                    parameter -= 0.1 * parameter.grad
                    for slot in slots:
                        dict(layer.named_parameters())[slot.name].copy_(
                            parameter[slot.start : slot.start + slot.numel].view(slot.shape)
                        )
        for parameter in [p for m in (*plain, *units) for p in m.parameters()]:
            parameter.grad = None
    assert Again.count == 4 * 2 * len(units)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_units_that_nothing_links(recompute: Any) -> None:
    """Ordinary work between units, and other shared inputs for each: what the backward reads again is still theirs."""
    plain, units = made(recompute)

    def step(layers: list[nn.Module], number: int) -> list[Tensor]:
        source = torch.Generator().manual_seed(number)
        x, y, *own = (torch.randn(3, n, generator=source, requires_grad=True) for n in (6, 4, 6, 4, 6, 4, 6, 4))
        out = (x * 1.0, y * 1.0)
        for layer, (rows, text) in zip(layers, zip(own[::2], own[1::2], strict=True), strict=True):
            out = layer(out[0] * 1.1, out[1] * 0.9, Shared(rows * 2.0, text * 1.0), FACTOR)
        (out[0].pow(2).sum() + out[1].sum()).backward()
        return [leaf.grad for leaf in (x, y, *own) if leaf.grad is not None]

    for number in range(WARM_UP + 3):
        for a, b in zip(step(plain, number), step(list(units), number), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_with_recomputation_two_places_serve_all_input_gradients() -> None:
    _, units = made("full", 6)
    for step in range(WARM_UP + 1):
        run(list(units), step)
    captured = [captured_of(unit) for unit in units]
    addresses = {one._below[len(one._flats.rooms)].data_ptr() for one in captured}
    assert len(addresses) == 2


def test_outputs_are_read_where_they_are() -> None:
    """The input of a unit is the output of the one before, and its gradient likewise: neither is copied."""
    _, units = made("none")
    for step in range(WARM_UP + 1):
        run(list(units), step)
    captured = [captured_of(unit) for unit in units]
    for before, after in pairwise(captured):
        for out, room in zip(before._out, after._inputs.rooms, strict=False):
            assert out.data_ptr() == room.data_ptr()
        for above, below in zip(before._above, after._below[len(after._flats.rooms) :], strict=False):
            assert below is not None and above.data_ptr() == below.data_ptr()


def test_other_shapes_constants_and_evaluation_run_as_they_are() -> None:
    plain, units = made("none")
    for step in range(WARM_UP + 1):
        run(list(units), step)
        run(plain, step)
    Again.count = 0
    assert torch.equal(run(plain, 9, batch=5)[0], run(list(units), 9, batch=5)[0])
    other = [-2.0]
    assert torch.equal(run(plain, 10, factor=other)[0], run(list(units), 10, factor=other)[0])
    with torch.no_grad():
        inputs = (torch.randn(3, 6), torch.randn(3, 4), Shared(torch.randn(3, 6), torch.randn(3, 4)), FACTOR)
        assert torch.equal(plain[0](*inputs)[0], units[0](*inputs)[0])
    assert Again.count == 0
    run(list(units), 11)
    assert Again.count == 2 * len(units)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_clips_of_several_sizes_have_graphs_of_their_own(recompute: Any) -> None:
    """Sizes by turns, in an order that changes: each gives what ordinary layers give, replayed once warm."""
    plain, units = made(recompute)
    Again.count, replayed = 0, 0
    for step, batch in enumerate((5, 3, 5, 5, 3, 2, 3, 5, 3, 2, 5, 2, 2, 3, 5)):
        before = Again.count
        move(units)
        wanted, found = run(plain, step, batch), run(list(units), step, batch)
        assert torch.equal(wanted[0], found[0]), step
        for a, b in zip(wanted[1], found[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        replayed += Again.count > before
    assert replayed == 15 - 3 * WARM_UP and Again.count == replayed * 2 * len(units)
    assert len(units[0]._graph._captured) == 3
    Again.dropped = 0
    units[0].drop_graphs()
    assert Again.dropped == 2 * 3


def test_a_further_size_computes_again_instead_of_keeping_until_it_has_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory: the first size's graphs hold that of a pass."""
    _, units = made("none")
    policies: list[str] = []

    def spied(work: Any, args: Any, policy: Any) -> Any:
        policies.append(policy)
        return work(*args)

    monkeypatch.setattr("dualforce.train.gather_unit.recomputed", spied)
    for step in range(WARM_UP + 1):
        run(list(units), step, 3)
    assert policies == []
    for step in range(WARM_UP + 1):
        run(list(units), step, 4)
    assert policies == ["full"] * WARM_UP * len(units)


def test_sizes_beyond_the_last_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualforce.train.graphed.MAX_KINDS", 2)
    plain, units = made("none")
    for batch in (2, 3):
        for step in range(WARM_UP + 1):
            run(list(units), step, batch)
    Again.count = 0
    for step in range(WARM_UP + 2):
        assert torch.equal(run(plain, step, 4)[0], run(list(units), step, 4)[0])
    assert Again.count == 0 and len(units[0]._graph._captured) == 2


@pytest.mark.parametrize("partitioned", [False, True])
def test_gradients_that_are_kept_are_copies(partitioned: bool) -> None:
    """ZeRO-3 takes them away before the next backward; elsewhere those of several clips are added up in place."""
    torch.manual_seed(1)
    unit = GatherUnit(Layer(True), "none", partitioned=partitioned, graphs=GraphPool(Again))
    flat = unit.matrices
    for step in range(WARM_UP + 1):
        flat.grad = None
        run([unit], step)
    first = flat.grad
    assert first is not None
    value, place = first.clone(), captured_of(unit)._below[0]
    assert (first.data_ptr() == place.data_ptr()) == partitioned
    if not partitioned:
        flat.grad = None
        run([unit], 11)
        assert torch.equal(first, value) and not torch.equal(first, place)


def test_graphs_are_given_up_once() -> None:
    _, units = made("none")
    for step in range(WARM_UP + 1):
        run(list(units), step)
    Again.dropped = 0
    for unit in units:
        unit.drop_graphs()
    assert Again.dropped == 2 * len(units)  # forward and backward
    GatherUnit(nn.Linear(2, 2)).drop_graphs()  # without graphs there is nothing to give up
