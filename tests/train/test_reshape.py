"""What resuming in another shape refuses, and what it checks of what arrived; whole runs are in
tests/invariants/test_elastic.py. Without ZeRO, AdamW's own states are the checkpoint's and the engine's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.checkpoint_folder import seal, write_checkpoint
from torch import Tensor, nn

from dualforce.config import ConfigError
from dualforce.train import reshape
from dualforce.train.checkpoint import SavedState, read_fp32_state
from dualforce.train.gather_unit import ALIGN, Slot
from dualforce.train.partitions import Piece, Stored, read_stored
from dualforce.train.reshape import describe_change, load_reshaped
from megatron_ext.parallel.grid import ProcessGrid

DECAYED, PLAIN = {"a": 2 * ALIGN, "b": ALIGN}, {"a": ALIGN}
UNITS = {
    "a": {"matrices": [Slot("w", (DECAYED["a"],), 0)], "vectors": [Slot("v", (PLAIN["a"],), 0)]},
    "b": {"matrices": [Slot("w", (DECAYED["b"],), 0)]},
}
BATCHES = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
SAVED = SavedState(3, 2, 1, 0, {}, BATCHES, UNITS, "torch.optim.adamw.AdamW", "0" * 64, {})
HERE = replace(SAVED, step=0, world=1)


class Optimizer(torch.optim.AdamW):
    """AdamW; `spoil` is what goes wrong on loading."""

    spoil: Callable[[Optimizer], object] | None = None

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        if self.spoil is not None:
            self.spoil(self)


def make_engine(seed: int) -> Any:
    """As DeepSpeed's without ZeRO, in fp32: a module of flat tensors, and AdamW of both groups."""
    source = torch.Generator().manual_seed(seed)
    module = nn.ModuleDict({name: nn.Module() for name in UNITS})
    for name, layout in UNITS.items():
        for flat, (slot,) in layout.items():
            module[name].register_parameter(flat, nn.Parameter(torch.randn(slot.numel, generator=source)))
    groups = [
        {"params": [module["a"].matrices, module["b"].matrices], "weight_decay": 0.1},
        {"params": [module["a"].vectors], "weight_decay": 0.0},
    ]
    optimizer = Optimizer(groups, lr=1e-2)
    return SimpleNamespace(
        module=module, optimizer=optimizer, basic_optimizer=optimizer, lr_scheduler=None, global_steps=0,
        skipped_steps=0, global_samples=0, train_batch_size=lambda: 4,
    )  # fmt: skip


def step(engine: Any) -> None:
    for parameter in engine.module.parameters():
        parameter.grad = torch.ones_like(parameter) * parameter.detach().abs().mean()
    engine.optimizer.step()


def content(engine: Any) -> dict[str, Any]:
    """What DeepSpeed writes without ZeRO."""
    return {
        "module": engine.module.state_dict(), "optimizer": engine.optimizer.state_dict(), "lr_scheduler": None,
        "global_steps": 3, "skipped_steps": 1,
    }  # fmt: skip


@pytest.fixture
def trained(tmp_path: Path) -> Any:
    """An engine after three steps; its checkpoint is in `tmp_path`."""
    engine = make_engine(0)
    for _ in range(3):
        step(engine)
    torch.save(content(engine), tmp_path / "mp_rank_00_model_states.pt")
    return engine


def load(engine: Any, folder: Path, saved: SavedState = SAVED, here: SavedState = HERE) -> None:
    load_reshaped(engine, folder, saved, here, ProcessGrid.single())


def test_what_was_saved_arrives_and_goes_on(trained: Any, tmp_path: Path) -> None:
    engine = make_engine(1)
    load(engine, tmp_path)
    assert (engine.global_steps, engine.skipped_steps, engine.global_samples) == (3, 1, 12)
    for one in (trained, engine):
        step(one)
    for key, tensor in trained.module.state_dict().items():
        assert torch.equal(engine.module.state_dict()[key], tensor), key


@pytest.mark.parametrize("bf16", [False, True])
def test_the_weights_of_an_export_are_those_that_the_optimizer_steps(tmp_path: Path, bf16: bool) -> None:
    """In bf16 without ZeRO too, where the module has them rounded."""
    engine = make_engine(0)
    step(engine)
    values, weights = content(engine), {name: t.clone() for name, t in engine.module.state_dict().items()}
    if bf16:
        masters = [[p.detach().clone() for p in group["params"]] for group in engine.optimizer.param_groups]
        values["optimizer"] = {"optimizer_state_dict": values["optimizer"], "fp32_groups": masters}
        values["module"] = {name: tensor.bfloat16() for name, tensor in values["module"].items()}
    folder = write_checkpoint(tmp_path, replace(SAVED, world=1, engine={**BATCHES, **(BF16 if bf16 else {})}))
    torch.save(values, folder / "mp_rank_00_model_states.pt")
    seal(folder)
    found = read_fp32_state(tmp_path)
    assert found.keys() == {"a.w", "a.v", "b.w"}
    for name, flat in {"a.w": "a.matrices", "a.v": "a.vectors", "b.w": "b.matrices"}.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name], weights[flat]), name


def forget(key: str | None) -> Callable[[Stored, Tensor, Piece, str | None], None]:
    copy_to = Stored.copy_to

    def without(self: Stored, target: Tensor, piece: Piece, of: str | None) -> None:
        if of != key:
            copy_to(self, target, piece, of)

    return without


@pytest.mark.parametrize(
    ("key", "named"), [(None, "fp32 weights of a"), ("exp_avg", "exp_avg of a"), ("exp_avg_sq", "exp_avg_sq of a")]
)
def test_tensors_that_do_not_arrive_are_named(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None, named: str
) -> None:
    monkeypatch.setattr(Stored, "copy_to", forget(key))
    with pytest.raises(ConfigError, match=rf"{named}\.\w+ did not arrive in the engine: expected what the checkpoint"):
        load(make_engine(1), tmp_path)


def same_decay(optimizer: Optimizer) -> None:
    """What DeepSpeed's universal checkpoint does with ZeRO-3."""
    for group in optimizer.param_groups:
        group["weight_decay"] = optimizer.param_groups[0]["weight_decay"]


def no_steps(optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        state["step"] = torch.zeros(())


def other_rate(optimizer: Optimizer) -> None:
    optimizer.param_groups[1]["lr"] = 1.0


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (same_decay, r"weight_decay \(0\.0, not 0\.1\)"),
        (no_steps, r"step \(3\.0, not 0\.0\)"),
        (other_rate, r"lr \(0\.01, not 1\.0\)"),
    ],
)
def test_numbers_that_do_not_arrive_are_named(
    trained: Any, tmp_path: Path, spoil: Callable[[Optimizer], object], named: str
) -> None:
    engine = make_engine(1)
    engine.optimizer.spoil = spoil
    with pytest.raises(ConfigError, match=rf"{named} did not arrive in the engine"):
        load(engine, tmp_path)


def test_the_step_count_is_that_of_the_checkpoint(trained: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the step count \(4, not 3\) did not arrive"):
        load(make_engine(1), tmp_path, replace(SAVED, step=4))


def test_how_an_optimizer_computes_is_the_runs_own(trained: Any, tmp_path: Path) -> None:
    engine = make_engine(1)
    for group in engine.optimizer.param_groups:
        group["foreach"] = True
    load(engine, tmp_path)
    assert all(group["foreach"] is True for group in engine.optimizer.param_groups)


def test_weights_that_the_forward_does_not_see_are_named(trained: Any, tmp_path: Path) -> None:
    """bf16: the optimizer's fp32 tensors and what is computed with are two."""
    engine = make_engine(0)
    masters = [[p.detach().clone() for p in group["params"]] for group in engine.optimizer.param_groups]
    rounded = [list(group["params"]) for group in engine.optimizer.param_groups]
    for parameter in engine.module.parameters():
        parameter.data = parameter.data.bfloat16()
    basic = torch.optim.AdamW([{"params": of} for of in masters], lr=0.0)
    for master in (one for of in masters for one in of):
        master.grad = torch.zeros_like(master)
    basic.step()
    half = SimpleNamespace(
        module=engine.module, basic_optimizer=basic, optimizer=SimpleNamespace(fp16_groups=rounded)
    )  # fmt: skip
    stored = SimpleNamespace(keys=[], equal=lambda name, key, whole: True)

    def wrong() -> list[str]:
        return reshape._wrong_tensors(half, 0, stored, ProcessGrid.single())  # type: ignore[arg-type]

    assert wrong() == []
    engine.module["b"].matrices.data[-1] += 1
    assert wrong() == ["weights of b.matrices"]
    source = read_stored(tmp_path, 0, False, 2, UNITS)
    half.optimizer.state_dict, half.optimizer.load_state_dict = basic.state_dict, basic.load_state_dict
    reshape._fill(half, 0, source, ProcessGrid.single())
    assert wrong() == []
    for name, parameter in engine.module.named_parameters():
        assert torch.equal(parameter, trained.module.state_dict()[name].bfloat16()), name


BF16 = {"bf16": {"enabled": True}}
STATES: dict[str, tuple[dict[str, Any], int, str, str]] = {
    "nvme-optimizer": ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, 3, "AdamW",
                       r"zero_optimization\.offload_optimizer\.device = nvme"),
    "nvme-param": ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, 3, "AdamW",
                   r"zero_optimization\.offload_param\.device = nvme"),
    "elastic": ({"zero_optimization": {"elastic_checkpoint": True}}, 1, "AdamW",
                r"zero_optimization\.elastic_checkpoint = true"),
    "stage-1": ({**BF16, "data_types": {"grad_accum_dtype": "fp32"}}, 1, "AdamW",
                r"zero_optimization\.stage = 1 with bf16\.enabled and data_types\.grad_accum_dtype = fp32"),
    "apex": (BF16, 0, "apex.optimizers.fused_adam.FusedAdam",
             r"zero_optimization\.stage = 0 with bf16\.enabled and apex\.optimizers\.fused_adam\.FusedAdam"),
}  # fmt: skip
FINE: dict[str, tuple[dict[str, Any], int, str]] = {
    "cpu": ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": None}}, 3, "AdamW"),
    "stage-1-bf16": ({**BF16, "data_types": {"grad_accum_dtype": "bf16"}}, 1, "AdamW"),
    "stage-1-fp32": ({"data_types": {"grad_accum_dtype": "fp32"}}, 1, "AdamW"),
    "stage-2": ({**BF16, "data_types": {"grad_accum_dtype": "fp32"}}, 2, "AdamW"),
    "apex-fp32": ({}, 0, "apex.optimizers.fused_adam.FusedAdam"),
    "apex-stage-2": (BF16, 2, "apex.optimizers.fused_adam.FusedAdam"),
    "torch-bf16": (BF16, 0, "torch.optim.adamw.AdamW"),
}


@pytest.mark.parametrize("whose", ["the checkpoint", "this run"])
@pytest.mark.parametrize("name", STATES)
def test_states_that_are_kept_otherwise_are_refused(trained: Any, tmp_path: Path, name: str, whose: str) -> None:
    """On either side; before anything is written into the engine."""
    config, stage, optimizer, named = STATES[name]
    other = {"engine": {**BATCHES, **config}, "zero_stage": stage, "optimizer": optimizer}
    engine = make_engine(1)
    before = {key: tensor.clone() for key, tensor in engine.module.state_dict().items()}
    saved, here = (replace(s, **other) if whose == w else s for s, w in ((SAVED, "the checkpoint"), (HERE, "this run")))
    with pytest.raises(ConfigError, match=rf"^DeepSpeed file: {whose} has {named}: expected equal ranks and ZeRO") as e:
        load(engine, tmp_path, saved, here)
    assert "\n" not in str(e.value)
    assert all(torch.equal(before[key], tensor) for key, tensor in engine.module.state_dict().items())


@pytest.mark.parametrize("name", FINE)
def test_states_that_can_be_read_are_not_refused(name: str) -> None:
    config, stage, optimizer = FINE[name]
    reshape._check_settings(replace(SAVED, engine=config, zero_stage=stage, optimizer=optimizer), "this run")


def test_every_part_of_the_change_is_told() -> None:
    assert describe_change(SAVED, replace(SAVED, step=9, shards="1")) is None
    other = replace(
        SAVED, world=8, sequence=4, zero_stage=3, engine={**BATCHES, "gradient_accumulation_steps": 2}
    )  # fmt: skip
    expected = "ranks 2 -> 8, sequence 1 -> 4, ZeRO stage 0 -> 3, micro-batch 1 x 1 -> 1 x 2"
    assert describe_change(SAVED, other) == expected
    assert reshape.other_partition(SAVED, replace(SAVED, world=1))
    assert reshape.other_partition(SAVED, replace(SAVED, zero_stage=1))
    assert not reshape.other_partition(SAVED, replace(other, world=2, zero_stage=0))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c["optimizer"]["state"][1].pop("exp_avg"), "not every tensor has the optimizer's state; expected a"),
        (lambda c: c["optimizer"]["state"][0].update(max=torch.ones(2 * ALIGN)), "not every tensor has the opt"),
        (lambda c: [s.clear() for s in c["optimizer"]["state"].values()], "not every tensor has the optimizer's state"),
        (lambda c: c["optimizer"]["state"][2]["step"].add_(1), "step differ between tensors; expected those of one"),
        (lambda c: c["optimizer"]["state"].update({1: {k: v[:-1] if v.dim() else v for k, v in
                                                       c["optimizer"]["state"][1].items()}}),
         r"b\.matrices ends beyond the tensor that holds it"),
        (lambda c: c["module"].update({"b.matrices": c["module"]["b.matrices"][:-1]}), r"b\.matrices is not whole"),
        (lambda c: c.pop("global_steps"), r"not a checkpoint that DeepSpeed 0\.19\.8 writes: KeyError"),
        (lambda c: c.update(optimizer=None), r"not a checkpoint that DeepSpeed 0\.19\.8 writes: AttributeError"),
    ],
)  # fmt: skip
def test_files_that_do_not_hold_a_whole_checkpoint_are_refused(
    trained: Any, tmp_path: Path, change: Callable[[dict[str, Any]], object], named: str
) -> None:
    values = content(trained)
    read_stored(tmp_path, 0, False, 1, UNITS)
    change(values)
    torch.save(values, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(ConfigError, match=named) as error:
        read_stored(tmp_path, 0, False, 1, UNITS)
    assert "\n" not in str(error.value) and "ConfigError" not in str(error.value)
