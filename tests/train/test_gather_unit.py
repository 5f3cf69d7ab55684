"""Gather units compute what their module computes, keep nothing of the flat tensors, and give every parameter back."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from helpers.tiny_model import kernels, random_inputs, randomise, tiny_config
from helpers.units import pack_state
from torch import Tensor, nn

from dualforce.config import LossConfig
from dualforce.model.dual_tower import DualTower
from dualforce.model.layer import DualLayer
from dualforce.model.layers import Mlp, linear
from dualforce.model.path import FullPath
from dualforce.model.placement import in_place
from dualforce.train.engine import parameter_groups
from dualforce.train.gather_unit import GatherUnit, layouts_of, unpack_state
from dualforce.train.train_module import TrainModule
from dualforce.types import FrameSpan


class Small(nn.Module):
    """A parent that reads a parameter of its own, two children, an odd size and a modulation."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 3, 5))
        self.first, self.second = nn.Linear(5, 7), nn.Sequential(nn.GELU(), nn.Linear(7, 5))
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * self.modulation[0, 1] + x


def pair(**options: Any) -> tuple[nn.Module, GatherUnit]:
    torch.manual_seed(0)
    plain = Small()
    return plain, GatherUnit(copy.deepcopy(plain), **options)


def named_gradients(unit: GatherUnit) -> dict[str, Tensor]:
    flat = {f"u.{name}": parameter.grad for name, parameter in unit.named_parameters()}
    return {name.removeprefix("u."): value for name, value in unpack_state(flat, {"u": unit.layout}).items()}


@pytest.mark.parametrize("partitioned", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full", "offload"])
def test_equals_the_module_bit_for_bit(recompute: Any, partitioned: bool) -> None:
    plain, unit = pair(recompute=recompute, partitioned=partitioned)
    x = torch.randn(4, 5, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    a, b = plain(x), unit(y)
    assert torch.equal(a, b)
    a.pow(2).sum().backward()
    b.pow(2).sum().backward()
    assert torch.equal(x.grad, y.grad)
    gradients = named_gradients(unit)
    for name, parameter in plain.named_parameters():
        wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.equal(gradients[name], wanted), name
    assert not list(unit.children()) and {name for name, _ in unit.named_parameters()} == {"matrices", "vectors"}


class Products(nn.Module):
    """Weights whose gradients are written into the flat one, one that is used twice, one that autograd brings and one
    that nothing uses, with an odd size before the last."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.twice = Mlp(5, 7, kernels()), nn.Linear(5, 5)
        self.plain, self.unused = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = linear(self.mlp(x), self.twice.weight, self.twice.bias, kernels())
        return self.plain(linear(y, self.twice.weight, self.twice.bias, kernels()))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_products_write_their_slots_of_the_flat_gradient(recompute: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain = Products()
    unit = GatherUnit(copy.deepcopy(plain), recompute, partitioned=True)
    written: list[Tensor] = []
    product = torch.mm

    def spied(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        if out is not None:
            out.fill_(torch.nan)
            written.append(out)
        return product(a, b, out=out)

    def spoilt(like: Tensor, *size: Any, **options: Any) -> Tensor:
        return empty(like, *size, **options).fill_(torch.nan)

    empty = Tensor.new_empty
    monkeypatch.setattr(torch, "mm", spied)
    monkeypatch.setattr(Tensor, "new_empty", spoilt)
    for step in range(2):  # a second backward begins a new gradient and leaves the first alone
        x, before = torch.randn(4, 5), unit.matrices.grad
        kept = None if before is None else before.clone()
        plain.zero_grad(), unit.zero_grad()
        plain(x).pow(2).sum().backward()
        del written[:]
        unit(x).pow(2).sum().backward()
        found = named_gradients(unit)
        for name, parameter in plain.named_parameters():
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found[name], wanted, rtol=1e-6, atol=1e-6, msg=f"{step} {name}")
        room = unit.matrices.grad.untyped_storage().data_ptr()
        assert [tuple(out.shape) for out in written] == [(5, 5), (5, 7), (7, 5)]
        assert all(out.untyped_storage().data_ptr() == room for out in written)
        assert kept is None or torch.equal(before, kept)
        used = sum(slot.numel for slot in unit.layout["matrices"])
        # Nothing between the slots, where the gradient's norm would count it.
        assert (unit.matrices.grad == 0).sum() >= unit.matrices.numel() - used > 0


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_gathered_tensor_dies_with_the_forward_and_may_come_back_elsewhere(recompute: Any) -> None:
    """What ZeRO-3 does: the data are there in the forward, gone after it, and gathered anew for the backward."""
    plain, unit = pair(recompute=recompute, partitioned=True)
    x = torch.randn(4, 5)
    plain(x).pow(2).sum().backward()
    shards = {name: parameter.detach().clone() for name, parameter in unit.named_parameters()}
    out = unit(x)
    gone = [weakref.ref(p.untyped_storage()) for p in unit.parameters()]
    addresses = []
    for parameter in unit.parameters():
        addresses.append(parameter.data_ptr())
        parameter.data = torch.empty(0)
    assert all(ref() is None for ref in gone)
    blocker = [torch.full_like(value, torch.nan) for value in shards.values()]  # takes the old addresses, if anything
    for name, parameter in unit.named_parameters():
        parameter.data = torch.cat((torch.full((64,), torch.nan), shards[name]))[64:]  # another place, with an offset
    out.pow(2).sum().backward()
    assert blocker
    gradients = named_gradients(unit)
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(gradients[name], parameter.grad), name


def test_slots_are_aligned_and_states_go_both_ways() -> None:
    plain, unit = pair()
    assert all(slot.start % 64 == 0 for slots in unit.layout.values() for slot in slots)
    assert [slot.name for slot in unit.layout["matrices"]] == ["first.weight", "second.1.weight"]
    layouts = {"u": unit.layout}
    state = unpack_state({f"u.{name}": p.detach() for name, p in unit.named_parameters()}, layouts)
    assert state.keys() == {f"u.{name}" for name, _ in plain.named_parameters()}
    for name, parameter in plain.named_parameters():
        assert torch.equal(state[f"u.{name}"], parameter)
    again = pack_state(state, layouts)
    assert all(torch.equal(again[f"u.{name}"], parameter) for name, parameter in unit.named_parameters())


def test_without_gradients_nothing_is_recorded() -> None:
    _, unit = pair(recompute="full", partitioned=True)
    with torch.no_grad():
        assert not unit(torch.randn(2, 5)).requires_grad


def test_the_whole_model_in_units_equals_the_model() -> None:
    config = tiny_config()
    plain = randomise(DualTower(config, kernels()), 0)

    def place(make: Any) -> nn.Module:
        module = make()
        return GatherUnit(module, "full" if isinstance(module, DualLayer) else "none", partitioned=True)

    model = DualTower(config, kernels(), place)
    layouts = layouts_of(model)
    state = dict(plain.state_dict())
    model.load_state_dict(pack_state(state, layouts))
    noised, cond = random_inputs(config)
    span = FrameSpan(0, noised.video.shape[1])
    for one in (plain, model):
        out = one(noised, cond, span, FullPath(one.rule, kernels(), span))
        (out.video.pow(2).mean() + out.struct.pow(2).mean()).backward()
    gradients = unpack_state({name: parameter.grad for name, parameter in model.named_parameters()}, layouts)
    assert gradients.keys() == state.keys(), "a parameter outside of every unit"
    for name, parameter in plain.named_parameters():
        # The null token of the audio is the one parameter that a batch with all its audio does not use.
        assert parameter.grad is not None and (parameter.grad.any() or name == "embedding.audio_projector.null"), name
        assert torch.equal(gradients[name], parameter.grad), name


def test_weight_decay_is_as_without_units() -> None:
    """Every parameter is decayed in units exactly if it is decayed alone (T20), the loss heads included."""

    def named(place: Any) -> tuple[set[str], set[str]]:
        module = TrainModule(tiny_config(), LossConfig(), kernels(), flame_dim=3, place=place)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        groups = [[names[id(p)] for p in group["params"]] for group in parameter_groups(module)]
        layouts = layouts_of(module)
        if layouts:
            groups = [
                [f"{name.rpartition('.')[0]}.{slot.name}" for name in group for slot in _slots(layouts, name)]
                for group in groups
            ]
        return set(groups[0]), set(groups[1])

    assert named(in_place) == named(lambda make: GatherUnit(make()))


def _slots(layouts: Any, name: str) -> Any:
    unit, _, flat = name.rpartition(".")
    return layouts[unit][flat]
