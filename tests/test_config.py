"""Run files: strictness, one line per error, `extends`, `--set`, and paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_model import tiny_config
from pydantic import ValidationError

from dualforce.config import ConfigError, RunConfig, validate
from dualforce.config_file import load_run, read_json

ROOT = Path(__file__).resolve().parent.parent
MINIMAL: dict[str, Any] = {"preset": "tiny", "deepspeed": "zero1.json", "train": {"steps": 3}}


def write(folder: Path, name: str, values: object) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    return path


def message(folder: Path, values: object, *overrides: str) -> str:
    path = write(folder, "run.json", values)
    with pytest.raises(ConfigError) as caught:
        load_run(path, overrides)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text, text
    return text


def test_minimal_file_takes_the_defaults(tmp_path: Path) -> None:
    run = load_run(write(tmp_path, "run.json", MINIMAL))
    assert (run.preset, run.train.steps, run.kernels) == ("tiny", 3, "auto")
    noise = run.noise
    assert (noise.shift_video, noise.shift_struct, noise.sample_shift_struct) == (3.0, 1.0, 0.5)
    assert (noise.max_sigma_struct, noise.p_above_max_struct) == (0.7, 0.2)
    assert (noise.p_clean_first, noise.p_clean_prefix, noise.p_same, noise.p_drop) == (0.8, 0.5, 0.1, 0.1)
    assert (run.loss.struct, run.loss.flame, run.loss.lip_sync) == (0.5, 0.1, 0.3)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs" / "runs").rglob("*.json")), ids=lambda path: path.stem)
def test_files_of_the_project_load(path: Path) -> None:
    run = load_run(path)
    assert Path(run.deepspeed).is_file()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"nois": {}}, ["unknown key nois", "did you mean noise?"]),
        ({"train": {"steps": 3, "log_evry": 5}}, ["unknown key train.log_evry = 5", "did you mean train.log_every?"]),
        ({"loss": {"lip": {"colls": [0, 1]}}}, ["unknown key loss.lip.colls", "did you mean loss.lip.cols?"]),
        ({"zzzz": 1}, ["unknown key zzzz = 1"]),
        ({"train": {}}, ["key train.steps is missing"]),
        ({"train": {"steps": "3"}}, ['train.steps = "3"', "integer"]),
        ({"train": {"steps": 3.5}}, ["train.steps = 3.5", "integer"]),
        ({"train": {"steps": 0}}, ["train.steps = 0", "greater than or equal to 1"]),
        ({"train": {"steps": True}}, ["train.steps = true", "integer"]),
        ({"preset": "huge"}, ['preset = "huge"', "'tiny', 'small', 'mova-lite' or 'mova-360p'"]),
        ({"noise": {"p_drop": 1.5}}, ["noise.p_drop = 1.5", "less than or equal to 1"]),
        ({"noise": {"shift_video": float("inf")}}, ["noise.shift_video = Infinity", "finite"]),
        ({"noise": {"shift_video": float("nan")}}, ["noise.shift_video = NaN", "finite"]),
        ({"noise": []}, ["noise = []", "object"]),
        ({"loss": {"lip": {"rows": [0.8, 0.2]}}}, ["loss.lip.rows = [0.8, 0.2]", "0 <= start < stop <= 1"]),
        ({"model": {"bridge_layers": "shalow"}}, ['model.bridge_layers = "shalow"', "integer", "'shallow_focus'"]),
        ({"model": {"bridge_layers": [1, "a"]}}, ['model.bridge_layers.1 = "a"', "integer"]),
    ],
)
def test_error_names_file_key_value_and_expectation(
    tmp_path: Path, change: dict[str, Any], expected: list[str]
) -> None:
    text = message(tmp_path, {**MINIMAL, **change})
    assert all(part in text for part in expected), text


def test_unknown_key_far_from_any_other_gets_no_hint(tmp_path: Path) -> None:
    assert "did you mean" not in message(tmp_path, {**MINIMAL, "qqqqqq": 1})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json: no such file"):
        load_run(tmp_path / "absent.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"preset": "tiny",\n oops}')
    with pytest.raises(ConfigError, match=r"broken\.json: not JSON, line 2"):
        load_run(broken)
    with pytest.raises(ConfigError, match="expected a JSON object, found list"):
        read_json(write(tmp_path, "list.json", [1]))
    for text in ("[" * 100_000, '{"steps": ' + "9" * 5000 + "}"):
        (tmp_path / "odd.json").write_text(text)
        with pytest.raises(ConfigError, match=r"odd\.json: not JSON that can be read: "):
            read_json(tmp_path / "odd.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bytes\.json: cannot be read"):
        load_run(tmp_path / "bytes.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run(tmp_path)


def test_extends_overrides_key_by_key(tmp_path: Path) -> None:
    base = {**MINIMAL, "train": {"steps": 3, "seed": 5}, "noise": {"p_drop": 0.2}, "model": {"bridge_layers": [0, 1]}}
    write(tmp_path, "base.json", base)
    delta = {"extends": "base.json", "train": {"steps": 7}, "model": {"bridge_layers": [1]}}
    run = load_run(write(tmp_path, "delta.json", delta))
    assert (run.train.steps, run.train.seed, run.noise.p_drop) == (7, 5, 0.2)
    assert run.model.bridge_layers == [1]  # lists are replaced, not merged


def test_extends_one_level_only(tmp_path: Path) -> None:
    write(tmp_path, "a.json", MINIMAL)
    write(tmp_path, "b.json", {"extends": "a.json"})
    with pytest.raises(ConfigError, match=r"c\.json: extends .*b\.json, which extends another file; expected one"):
        load_run(write(tmp_path, "c.json", {"extends": "b.json"}))


def test_extends_of_nothing(tmp_path: Path) -> None:
    assert "extends = gone.json: no such file" in message(tmp_path, {"extends": "gone.json"})
    assert "extends = 3: expected the name of a run file" in message(tmp_path, {"extends": 3})


def test_paths_are_relative_to_the_file_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = {**MINIMAL, "deepspeed": "../ds/zero1.json", "data": {"shards": "set", "video_codec": "vae"}}
    write(tmp_path, "base/run.json", base)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    delta = write(tmp_path, "delta/run.json", {"extends": "../base/run.json"})
    run = load_run(delta)
    assert Path(run.deepspeed).resolve() == tmp_path / "ds" / "zero1.json"
    assert Path(run.data.shards).resolve() == tmp_path / "base" / "set"
    assert run.data.video_codec and Path(run.data.video_codec).resolve() == tmp_path / "base" / "vae"
    own = load_run(write(tmp_path, "delta/own.json", {"extends": "../base/run.json", "data": {"shards": "mine"}}))
    assert Path(own.data.shards).resolve() == tmp_path / "delta" / "mine"
    assert load_run(delta, ["data.shards=here"]).data.shards == "here"  # of an override: the working directory


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, "run.json", MINIMAL)
    run = load_run(
        path,
        ["train.steps=9", "noise.p_drop=0.25", "model.bridge_layers=[0, 2]", "model.bridge_directions=s2v",
         "parallel.recompute=selective", "model.window=null", "loss.lip.dim=8", "deepspeed=x=y.json"],
    )  # fmt: skip
    assert (run.train.steps, run.noise.p_drop, run.model.bridge_layers) == (9, 0.25, [0, 2])
    assert (run.model.bridge_directions, run.parallel.recompute, run.model.window) == ("s2v", "selective", None)
    assert (run.loss.lip.dim, run.deepspeed) == (8, "x=y.json")


@pytest.mark.parametrize("item", ["train.steps", "=3", ""])
def test_override_without_key_and_value(tmp_path: Path, item: str) -> None:
    with pytest.raises(ConfigError, match=f"--set {item}: expected key=value"):
        load_run(write(tmp_path, "run.json", MINIMAL), [item])


def test_wrong_overrides(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="preset is a value, not a section"):
        load_run(write(tmp_path, "run.json", MINIMAL), ["preset.x=1"])
    text = message(tmp_path, MINIMAL, "train.stepz=1")
    assert "--set train.stepz=1" in text and "did you mean train.steps?" in text
    assert 'train.steps = "many"' in message(tmp_path, MINIMAL, "train.steps=many")


def test_run_survives_its_own_json() -> None:
    run = validate(RunConfig, {**MINIMAL, "model": {"bridge_layers": "full"}}, "x")
    assert validate(RunConfig, run.model_dump(mode="json"), "x") == run


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"video": {"heads": 3}}, "dim 64 over 3 heads"),
        ({"struct": {"dim": 12}}, "dim 12 over 4 heads"),  # head size 3 is odd
        ({"struct": {"layers": 4}}, "struct.layers 4: expected at most video.layers 3"),
        ({"audio": {"layers": 4}}, "audio.layers 4: expected at most struct.layers 3"),
        ({"audio": {"heads": 3}}, "audio.heads 3: expected a divisor"),
        ({"audio": {"inner": None, "heads": 64}}, "audio.heads 64: expected a divisor of the attention width 32"),
        ({"audio": {"context": 5}}, "less than or equal to 4"),
        ({"video": {"in_dim": 7}}, "video.in_dim 7: expected at least 8"),
        ({"video": {"freq_dim": 18}}, "multiple of 4"),
        ({"window": 0}, "greater than or equal to 1"),
    ],
)
def test_model_that_cannot_be_built(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        tiny_config(**change)


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    """In any object of a file, and in DeepSpeed's files too, which are read by the same function."""
    for text, key in (
        ('{"preset": "tiny", "preset": "small"}', "preset"),
        ('{"train": {"steps": 3, "seed": 1, "steps": 5}}', "steps"),
        ('{"list": [{"a": 1}, {"a": 1, "a": 1}]}', "a"),
    ):
        (tmp_path / "twice.json").write_text(text)
        with pytest.raises(ConfigError, match=rf"twice\.json: key {key}: given twice: expected once"):
            read_json(tmp_path / "twice.json")
    (tmp_path / "twice.json").write_text('{"a": {"b": 1}, "b": [{"a": 2}, {"a": 3}]}')
    assert read_json(tmp_path / "twice.json") == {"a": {"b": 1}, "b": [{"a": 2}, {"a": 3}]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('data={"frames": 5, "frames": 9}', "--set data: key frames: given twice: expected once"),
        ("train.steps=" + "9" * 5000, "--set train.steps: not JSON that can be read: .*4300 digits"),
        ("train.steps=" + "[" * 100_000, "--set train.steps: not JSON that can be read: too many brackets"),
    ],
)
def test_a_value_on_the_command_line_is_read_as_a_file_is(tmp_path: Path, text: str, expected: str) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match=expected) as caught:
        load_run(tmp_path / "run.json", [text])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_brackets_without_end_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text('{"a": ' + "[" * 200_000)
    with pytest.raises(ConfigError, match=r"deep\.json: not JSON that can be read: too many brackets in each other"):
        read_json(tmp_path / "deep.json")


def test_a_seed_that_no_generator_takes_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "run.json", MINIMAL)
    torch.manual_seed(load_run(path, [f"train.seed={2**63 - 1}"]).train.seed)
    with pytest.raises(ConfigError, match=rf"train\.seed = {2**63}: Input should be less than {2**63}"):
        load_run(path, [f"train.seed={2**63}"])
