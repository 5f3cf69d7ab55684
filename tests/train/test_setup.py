"""Choices between the run file and the engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from helpers.fake_shards import fake_extractors
from helpers.tiny_model import kernels

from dualforce.config import ConfigError, RunConfig, validate
from dualforce.train.setup import model_config, with_graphs


@pytest.mark.parametrize(
    ("name", "parallel", "expected"),
    [
        ("fused", {}, True),
        ("flex", {}, False),
        ("reference", {}, False),
        ("fused", {"recompute": "full"}, True),
        ("fused", {"recompute": "selective"}, True),
        ("fused", {"recompute": "offload"}, False),
        ("fused", {"graphs": False}, False),
        ("flex", {"graphs": True}, True),
    ],
)
def test_graphs_are_on_where_they_run(name: str, parallel: dict[str, Any], expected: bool) -> None:
    values = {"preset": "tiny", "deepspeed": "x", "train": {"steps": 1}, "parallel": parallel}
    assert with_graphs(validate(RunConfig, values, "test"), replace(kernels(), name=name)) is expected


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_captured_exchanges_in_expandable_memory_are_refused(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """Before the ranks wait for each other, for ever."""
    monkeypatch.setenv(variable, "max_split_size_mb:512, expandable_segments:True")
    values: dict[str, Any] = {"preset": "tiny", "deepspeed": "x", "train": {"steps": 1}}
    fused = replace(kernels(), name="fused")
    assert with_graphs(validate(RunConfig, values, "test"), fused)
    assert not with_graphs(validate(RunConfig, values | {"parallel": {"sequence": 2, "graphs": False}}, "test"), fused)
    with pytest.raises(ConfigError, match=r"parallel.sequence = 2 .*expandable_segments:True .*expected") as error:
        with_graphs(validate(RunConfig, values | {"parallel": {"sequence": 2}}, "test"), fused)
    assert "\n" not in str(error.value)


def manifest(**sizes: Any) -> dict[str, Any]:
    """What the choice of a model reads of a set of 9 latent frames."""
    extractors = fake_extractors(**sizes)
    return {"extractors": extractors, "frames": 9, "pixel_size": 8 * extractors["video"]["height"]}


def chosen(*manifests: dict[str, Any], frames: int = 9) -> Any:
    names = [f"set{number}" for number in range(len(manifests))]
    values = {"preset": "tiny", "deepspeed": "x", "train": {"steps": 1}, "data": {"shards": names, "frames": frames}}
    return model_config(validate(RunConfig, values, "test"), manifests)


def test_widths_of_the_shards_are_those_of_the_model() -> None:
    model = chosen(manifest(struct_dim=7, audio_dim=5, text_dim=64), manifest(struct_dim=7, audio_dim=5, text_dim=64))
    assert (model.struct.in_dim, model.struct.out_dim, model.audio.dim, model.video.text_dim) == (7, 7, 5, 64)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (manifest(channels=8), "set1: video has 8 channels; expected 16"),
        (manifest(height=5), "set1: latent height 5; expected a multiple of 2"),
        (manifest(width=3), "set1: latent width 3; expected a multiple of 2"),
        (manifest(text_dim=512), "set1: text has width 512; expected 64, that of the preset tiny"),
        (manifest() | {"frames": 3}, "data.frames = 9: the clips in set1 have 3 latent frames"),
        (manifest() | {"pixel_size": 64}, "set1: pixel_size 64; expected 32, 8 times the latent height"),
        (
            {key: value for key, value in manifest().items() if key != "pixel_size"},
            "set1: pixel_size None; expected 32",
        ),
    ],
)
def test_a_set_that_does_not_fit_the_model_is_one_line_at_the_start(wrong: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        chosen(manifest(), wrong)
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)


@pytest.mark.parametrize(("frames", "example"), [(1, 3), (2, 3), (4, 3), (8, 7)])
def test_clips_are_frame_0_and_whole_chunks(frames: int, example: int) -> None:
    """Of frame 0 alone validation counts nothing: its means would be 0 / 0."""
    with pytest.raises(ConfigError) as error:
        chosen(manifest(), frames=frames)
    expected = "expected 1 + k * 2 (frame 0, which validation does not count, and at least one whole chunk)"
    assert str(error.value) == f"data.frames = {frames}: {expected}, for example {example}"
    assert chosen(manifest(), frames=3)
