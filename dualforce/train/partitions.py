"""Where the flat parameters lie in the tensors that an optimizer steps: in a checkpoint's files and in an engine.

ZeRO-3 cuts every parameter into as many equal parts as there are ranks and lays a rank's parts one behind the other,
in sub-groups. ZeRO-1 and ZeRO-2 lay a parameter group's parameters one behind the other and cut that. ZeRO-0 cuts
nothing. Each becomes the same list of pieces here, so that any can be read as any other.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dualforce.config import ConfigError
from dualforce.train.gather_unit import FLAT, Slot, flat_numel

Units = dict[str, dict[str, list[Slot]]]
UNREADABLE = (OSError, RuntimeError, ValueError, LookupError, AttributeError, TypeError, EOFError, pickle.PickleError)


class Piece(NamedTuple):
    """A run of elements of the parameter `name`, from `start`, that lies in a share from `at`."""

    name: str
    start: int
    at: int
    numel: int


@dataclass(frozen=True)
class Share:
    """One tensor that an optimizer steps: fp32 weights [N], and the optimizer's state of them (moments [N], step)."""

    pieces: list[Piece]
    weights: Tensor
    state: dict[str, Any]

    def moments(self) -> dict[str, Tensor]:
        """The tensors of the state that have an element for each weight."""
        return {key: value for key, value in self.state.items() if isinstance(value, Tensor) and value.dim() > 0}

    def tensor(self, key: str | None) -> Tensor:
        """The moment `key`, or the weights."""
        found: Tensor = self.weights if key is None else self.state[key]
        return found


@dataclass(frozen=True)
class Stored:
    """A checkpoint as its files hold it; tensors are mapped, not read."""

    pieces: dict[str, list[tuple[Piece, Share]]]  # by parameter, in order, without gaps
    groups: list[dict[str, Any]]  # the optimizer's hyperparameters by group, without `params`
    keys: list[str]  # of the moments
    scalars: dict[str, Any]  # what else the optimizer keeps for a tensor: its step
    engine: dict[str, Any]  # `lr_scheduler`, `global_steps`, `skipped_steps`

    def copy_to(self, target: Tensor, piece: Piece, key: str | None) -> None:
        """Write the elements that `piece` names, of the moment `key` or of the weights, where it says in `target`."""
        end = piece.start + piece.numel
        for found, share in self.pieces[piece.name]:
            first, last = max(found.start, piece.start), min(found.start + found.numel, end)
            if first < last:
                source = share.tensor(key)[found.at + first - found.start :][: last - first]
                target[piece.at + first - piece.start :][: last - first].copy_(source)

    def equal(self, name: str, key: str | None, whole: Tensor) -> bool:
        """Whether `whole` has, bit for bit, the stored elements of parameter `name`."""
        flat = whole.detach().flatten()
        return all(
            same_bits(flat[p.start :][: p.numel].cpu(), share.tensor(key)[p.at :][: p.numel])
            for p, share in self.pieces[name]
        )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype hold the same, NaN included."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def flat_names(units: Units) -> list[list[str]]:
    """The flat parameters by parameter group, in the order in which the optimizer has them."""
    return [[f"{unit}.{flat}" for unit, layout in units.items() if flat in layout] for flat in FLAT]


def files_of(folder: Path, stage: int, bf16: bool, rank: int) -> list[Path]:
    """What a checkpoint of DeepSpeed has for a rank: the model's file, then, with ZeRO, the optimizer's."""
    if stage == 0:
        return [folder / "mp_rank_00_model_states.pt"]
    model = f"zero_pp_rank_{rank}_" if stage == 3 else ""
    prefix = "bf16_" if bf16 else ""
    return [
        folder / f"{model}mp_rank_00_model_states.pt",
        folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
    ]


def read_stored(folder: Path, stage: int, bf16: bool, world: int, units: Units) -> Stored:
    """Map a checkpoint of `world` ranks and check that it holds every element of every flat parameter once.

    Raises ConfigError that names the file that is missing or cannot be read, or the parameter.
    """
    model = _load(files_of(folder, stage, bf16, 0)[0])
    try:
        if stage == 0:
            shares, groups = _whole(model, flat_names(units))
        else:
            contents = [_load(files_of(folder, stage, bf16, rank)[1]) for rank in range(world)]
            states = [content["optimizer_state_dict"] for content in contents]
            shares, groups = _zero3(states, model["param_shapes"]) if stage == 3 else _zero12(states)
        pieces = _by_name(shares, folder, units)
        first = shares[0].state
        keys = list(shares[0].moments())
        scalars = {key: value for key, value in first.items() if key not in keys}
        if not keys or any(share.state.keys() != first.keys() for share in shares):
            raise ConfigError(f"{folder}: not every tensor has the optimizer's state; expected a whole checkpoint")
        if any(share.state[key] != value for share in shares for key, value in scalars.items()):
            raise ConfigError(f"{folder}: {', '.join(scalars)} differ between tensors; expected those of one step")
        return Stored(
            pieces=pieces,
            groups=[{key: value for key, value in group.items() if key != "params"} for group in groups],
            keys=keys,
            scalars=scalars,
            engine={key: model[key] for key in ("lr_scheduler", "global_steps", "skipped_steps")},
        )
    except UNREADABLE as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{folder}: not a checkpoint that DeepSpeed 0.19.8 writes: {error!r}") from None


def _load(path: Path) -> dict[str, Any]:
    """Mapped; of classes only those that DeepSpeed puts into its files."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    if not path.is_file():
        raise ConfigError(f"{path}: no such file; expected the files of every rank of the checkpoint")
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UNREADABLE as error:
        raise ConfigError(f"{path}: cannot be read: {(str(error) or repr(error)).splitlines()[0]}") from None
    return content


def _whole(model: dict[str, Any], names: list[list[str]]) -> tuple[list[Share], list[dict[str, Any]]]:
    """ZeRO-0: the optimizer's tensors are the parameters, or, in bf16, their fp32 copies."""
    optimizer = model["optimizer"]
    base = optimizer.get("optimizer_state_dict", optimizer)
    masters = optimizer.get("fp32_groups")
    shares = []
    for group, of in enumerate(names):
        for i, name in enumerate(of):
            weights = (model["module"][name] if masters is None else masters[group][i]).detach().flatten()
            state = base["state"][base["param_groups"][group]["params"][i]]
            flat = {k: v.flatten() if isinstance(v, Tensor) and v.dim() > 0 else v for k, v in state.items()}
            shares.append(Share([Piece(name, 0, 0, weights.numel())], weights, flat))
    return shares, base["param_groups"]


def _zero12(ranks: list[dict[str, Any]]) -> tuple[list[Share], list[dict[str, Any]]]:
    shares, done = [], defaultdict[str, int](int)
    for state in ranks:
        base = state["base_optimizer_state"]
        for group, weights in enumerate(state["single_partition_of_fp32_groups"]):
            pieces = []
            for name, address in state["param_slice_mappings"][group].items():
                pieces.append(Piece(name, done[name], address.start, address.numel))
                done[name] += address.numel
            own = base["state"][base["param_groups"][group]["params"][0]]
            shares.append(Share(pieces, weights.detach(), own))
    return shares, ranks[0]["base_optimizer_state"]["param_groups"]


def _zero3(
    ranks: list[dict[str, Any]], shapes: list[dict[str, torch.Size]]
) -> tuple[list[Share], list[dict[str, Any]]]:
    shares = []
    for rank, state in enumerate(ranks):
        if state["partition_count"] != len(ranks):
            raise ValueError(f"{state['partition_count']} parts to a parameter: expected one for each rank")
        base = state["optimizer_state_dict"]
        for i, weights in enumerate(state["fp32_flat_groups"]):
            numels = {name: shape.numel() for name, shape in shapes[i].items()}
            parts = {name: -(-numel // len(ranks)) for name, numel in numels.items()}
            if sum(parts.values()) != weights.numel():
                raise ValueError(f"{weights.numel()} weights: expected {sum(parts.values())}, the parameters' parts")
            pieces = list(_zero3_pieces(numels, parts, rank))
            shares.append(Share(pieces, weights.detach(), base["state"][i]))
    return shares, ranks[0]["optimizer_state_dict"]["param_groups"]


def _zero3_pieces(numels: dict[str, int], parts: dict[str, int], rank: int) -> Iterator[Piece]:
    """The parts of one rank one behind the other; the last rank's may be padded, beyond the parameter's end."""
    at = 0
    for name, numel in numels.items():
        start = rank * parts[name]
        if start < numel:
            yield Piece(name, start, at, min(parts[name], numel - start))
        at += parts[name]


def _by_name(shares: list[Share], folder: Path, units: Units) -> dict[str, list[tuple[Piece, Share]]]:
    found = defaultdict[str, list[tuple[Piece, Share]]](list)
    for share in shares:
        for piece in share.pieces:
            if piece.at + piece.numel > min(t.numel() for t in (share.weights, *share.moments().values())):
                raise ConfigError(f"{folder}: {piece.name} ends beyond the tensor that holds it")
            found[piece.name].append((piece, share))
    for unit, layout in units.items():
        for flat, slots in layout.items():
            name, reached = f"{unit}.{flat}", 0
            found[name].sort(key=lambda pair: pair[0].start)
            for piece, _ in found[name]:
                reached = reached + piece.numel if piece.start == reached else -1
            if reached != flat_numel(slots):
                raise ConfigError(f"{folder}: {name} is not whole; expected its {flat_numel(slots)} elements once")
    return dict(found)


def shares_of(engine: Any, stage: int) -> list[Share]:
    """What this rank's optimizer steps, without state, in the order of the optimizer's own tensors."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    if stage == 3:
        rank, shares = dist.get_rank(group=optimizer.dp_process_group), []
        for i, weights in enumerate(optimizer.fp32_partitioned_groups_flat):
            of = optimizer.fp16_groups[i]
            numels = {names[id(p)]: p.ds_numel for p in of}
            pieces = list(_zero3_pieces(numels, {names[id(p)]: p.partition_numel() for p in of}, rank))
            shares.append(Share(pieces, weights.detach(), {}))
        return shares
    if stage > 0:
        return [
            Share(list(_zero12_pieces(optimizer.bit16_groups[group], names)), weights.detach(), {})
            for group, weights in enumerate(optimizer.single_partition_of_fp32_groups)
        ]
    stepped = [group["params"] for group in engine.basic_optimizer.param_groups]  # in bf16, fp32 copies
    shares = []
    for group, parameters in enumerate(getattr(optimizer, "fp16_groups", stepped)):
        for parameter, weights in zip(parameters, stepped[group], strict=True):
            piece = Piece(names[id(parameter)], 0, 0, parameter.numel())
            shares.append(Share([piece], weights.detach().view(-1), {}))
    return shares


def _zero12_pieces(parameters: list[nn.Parameter], names: dict[int, str]) -> Iterator[Piece]:
    for parameter in parameters:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # None where no element lies on this rank
        if mapping is not None:
            whole, own = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Piece(names[id(parameter)], whole.start, own.start, whole.numel)
