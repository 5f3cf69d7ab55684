"""Model folders: written whole or not at all, read back bitwise, and refused in one line when damaged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.model_folder import run_config, write_model_folder
from helpers.random_model import random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dualforce.config import ConfigError
from dualforce.weights.export import folder_config, tower_state, write_model
from dualforce.weights.keys import WeightsError, to_public
from dualforce.weights.load import load_model

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model_folder(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 1_000_000, 1], ids=["single", "sharded", "tensor-per-file"])
def test_round_trip_is_bitwise(tmp_path: Path, max_shard_bytes: int) -> None:
    model = random_model()
    config = folder_config(run_config(model), "run")
    write_model(tmp_path / "m", model.state_dict(), config, max_shard_bytes=max_shard_bytes)
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert ("model.safetensors" in names) == (max_shard_bytes > 10**9)
    assert ("model.safetensors.index.json" in names) == (max_shard_bytes < 10**9)
    loaded, found = load_model(tmp_path / "m", CPU, torch.float32)
    assert found == config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, model.state_dict()[name]) for name, a in loaded.state_dict().items())
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_plain_safetensors_reads_the_shards_and_the_index_is_complete(tmp_path: Path) -> None:
    model = random_model()
    write_model(tmp_path / "m", model.state_dict(), folder_config(run_config(model), "run"), max_shard_bytes=1_000_000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    found: dict[str, Tensor] = {}
    for name in sorted(set(index["weight_map"].values())):
        tensors = load_file(tmp_path / "m" / name)
        assert sum(t.nbytes for t in tensors.values()) <= 1_000_000 or len(tensors) == 1
        assert all(index["weight_map"][key] == name for key in tensors)
        found |= tensors
    expected = to_public(model.state_dict(), model.config)
    assert found.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())


def test_bf16_rounds_each_weight_once(tmp_path: Path) -> None:
    model = random_model()
    write_model(tmp_path / "m", model.state_dict(), folder_config(run_config(model), "run"), dtype=torch.bfloat16)
    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("video_dit.head.head.weight").dtype == torch.bfloat16
        assert file.metadata() == {"format": "pt"}
    loaded, _ = load_model(tmp_path / "m", CPU, torch.bfloat16)
    assert all(torch.equal(t, model.state_dict()[name].bfloat16()) for name, t in loaded.state_dict().items())


def test_loss_heads_are_left_out() -> None:
    state = {"model.a.model.b": torch.zeros(1), "heads.tau": torch.zeros(1), "modelx": torch.zeros(1)}
    assert list(tower_state(state)) == ["a.model.b"]


def test_card_names_extractors_and_hashes(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    for name in ("model.safetensors", "config.json"):
        assert f"| `{name}` | `{hashlib.sha256((folder / name).read_bytes()).hexdigest()}` |" in card
    assert "dct-4x8x8-16-v1" in card and "rendered-head-v1" in card and "Apache-2.0" in card


class Watched(Mapping[str, Tensor]):
    """A lazy state that counts the tensors it hands out."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state, self.reads = state, 0

    def __getitem__(self, name: str) -> Tensor:
        self.reads += 1
        return self.state[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)


def test_lazy_state_is_read_tensor_by_tensor(tmp_path: Path) -> None:
    model = random_model()
    state = Watched(model.state_dict())
    write_model(tmp_path / "m", state, folder_config(run_config(model), "run"))
    assert state.reads == len(to_public(model.state_dict(), model.config))  # once per written tensor, none to plan


def test_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    model = random_model()
    state = model.state_dict()
    state["ends.struct.head.weight"] = torch.full_like(state["ends.struct.head.weight"], torch.nan)
    with pytest.raises(WeightsError, match=r"struct_dit\.head\.head\.weight: contains NaN"):
        write_model(tmp_path / "m", state, folder_config(run_config(model), "run"))
    assert list(tmp_path.iterdir()) == []
    state["ends.struct.head.weight"] = torch.zeros(2, 2)
    with pytest.raises(WeightsError, match=r"ends\.struct\.head\.weight has shape \[2, 2\]: expected \[6, 64\]"):
        write_model(tmp_path / "m", state, folder_config(run_config(model), "run"))
    assert list(tmp_path.iterdir()) == []


def test_target_that_is_not_empty_is_refused(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(WeightsError, match="exists and is not empty"):
        write_model_folder(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_run_config_without_a_section_is_named() -> None:
    config = run_config(random_model())
    with pytest.raises(WeightsError, match=r"run/config\.json: key statistics is missing"):
        folder_config({key: value for key, value in config.items() if key != "statistics"}, "run/config.json")
    with pytest.raises(WeightsError, match=r"key run\.noise\.shift_video is missing"):
        folder_config(config | {"run": {"noise": {"sample_shift_struct": 0.5}}}, "run/config.json")


def _edit_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def _edit_weights(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return edit


def _truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


HEAD = "video_dit.head.head.bias"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no-config": (lambda f: (f / "config.json").unlink(), r"config\.json: no such file"),
    "not-json": (lambda f: (f / "config.json").write_text("{"), r"config\.json: not JSON, line 1"),
    "format": (_edit_json("config.json", lambda c: c.update(format="x")), r"format = 'x': expected 'dualforce-model'"),
    "version": (_edit_json("config.json", lambda c: c.update(version=9)), r"version = 9: expected 1"),
    "section": (_edit_json("config.json", lambda c: c.pop("statistics")), r"key statistics is missing"),
    "unknown-key": (_edit_json("config.json", lambda c: c["model"].update(windw=1)), r"windw = 1; did you mean window"),
    "no-extractor": (_edit_json("config.json", lambda c: c["extractors"].pop("audio")), r"extractors\.audio = None"),
    "no-tag": (
        _edit_json("config.json", lambda c: c["extractors"]["video"].pop("tag")),
        r"extractors\.video = .* a tag",
    ),
    "no-weights": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors: no such file"),
    "truncated": (_truncate, r"model\.safetensors: cannot be read as safetensors"),
    "missing-key": (_edit_weights(lambda t: t.pop(HEAD)), rf"missing {HEAD}: expected the 357 keys"),
    "extra-key": (_edit_weights(lambda t: t.update(more=torch.zeros(1))), r"unmapped more"),
    "shape": (_edit_weights(lambda t: t.update({HEAD: torch.zeros(3)})), rf"{HEAD} has shape \[3\]: expected \[64\]"),
    "dtype": (_edit_weights(lambda t: t.update({HEAD: torch.zeros(64, dtype=torch.int64)})), r"dtype torch\.int64"),
    "more-layers": (
        _edit_json("config.json", lambda c: c["model"]["video"].update(layers=5)),
        r"missing video_dit\.blocks\.4\.modulation.*and 21 more",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line(folder: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(folder)
    with pytest.raises((WeightsError, ConfigError), match=message) as caught:
        load_model(folder, CPU, torch.float32)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_index_cannot_point_outside_the_folder(tmp_path: Path) -> None:
    model = random_model()
    write_model(tmp_path / "m", model.state_dict(), folder_config(run_config(model), "run"), max_shard_bytes=1_000_000)
    _edit_json("model.safetensors.index.json", lambda c: c["weight_map"].update({HEAD: "../x.safetensors"}))(
        tmp_path / "m"
    )
    with pytest.raises(WeightsError, match=r"names '\.\./x\.safetensors': expected a file in the same folder"):
        load_model(tmp_path / "m", CPU, torch.float32)
