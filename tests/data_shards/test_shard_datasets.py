"""Hugging Face `datasets` reads the tars as they are: equal tensors, equal JSON, no network, nothing unpickled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.fake_shards import fake_extractors, fake_sample
from safetensors.torch import load_file

from data_shards.reader import ShardSet
from data_shards.writer import ShardSetWriter

ROOT = Path(__file__).resolve().parents[2]
CLIPS = 8  # `datasets` guesses types from five samples


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Several tars whose records do not all have the same fields, as those of real videos."""
    root, extractors = tmp_path / "set", fake_extractors(flame=True, text_dim=4)
    with ShardSetWriter(root, extractors, shard_bytes=40_000) as writer:
        for number in range(CLIPS):
            clip = fake_sample(f"clip-{number}", f"id{number}", extractors, frames=3, seed=number)
            meta = {"checks": {"rms": 0.5}, "boxes": [[0.0, 1.5]]}
            if number == CLIPS - 2:
                meta = {"checks": {"rms": 1, "yaw_degrees": 3.25}, "boxes": [], "caption": "späť"}
            writer.add("train" if number < CLIPS - 1 else "validation", replace(clip, meta=meta))
        writer.finish([], {})
    assert len(list(root.glob("train-*.tar"))) > 1
    return root


def read_with_datasets(root: Path, out: Path, way: str) -> subprocess.CompletedProcess[str]:
    out.mkdir()
    home = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(out / "home")}
    return run_here([sys.executable, "-m", "helpers.read_with_datasets", str(root), str(out), way], home)


def run_here(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return subprocess.run(
        command, env={**os.environ, **environment, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("way", ["stream", "store"])
def test_datasets_reads_what_was_written(shards: Path, tmp_path: Path, way: str) -> None:
    out = tmp_path / "out"
    done = read_with_datasets(shards, out, way)
    assert done.returncode == 0, done.stderr
    opened = ShardSet.open(shards)
    clips = [opened.split(split).read(i) for split in ("train", "validation") for i in range(len(opened.split(split)))]
    assert sorted(path.stem for path in out.glob("*.safetensors")) == sorted(clip.key for clip in clips)
    for clip in clips:
        tensors = load_file(out / f"{clip.key}.safetensors")
        assert tensors.keys() == clip.tensors().keys()
        for name, tensor in clip.tensors().items():
            assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), f"{clip.key} {name}"
        record = json.loads((out / f"{clip.key}.json").read_text())
        assert (record["key"], record["identity"], record["meta"]) == (clip.key, clip.identity, clip.meta)


@pytest.mark.parametrize(
    "harm",
    [
        "socket.create_connection(('127.0.0.1', 9))",
        "socket.getaddrinfo('localhost', 9)",
        "pickle.loads(pickle.dumps(pathlib.Path('x')))",
    ],
)
def test_the_reading_process_would_notice(harm: str) -> None:
    guard = "from helpers.read_with_datasets import forbid; sys.addaudithook(forbid)"
    done = run_here([sys.executable, "-c", f"import pathlib, pickle, socket, sys; {guard}; {harm}"], {})
    assert done.returncode != 0 and "RuntimeError: forbidden" in done.stderr, done.stderr
