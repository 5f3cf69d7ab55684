"""Runs on several shard sets through the command line: two sizes and two lengths, stop and resume, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.fake_shards import write_fake_shards
from helpers.launches import Launch, Outcome, launch_all
from helpers.run_records import records

from dualforce.train.checkpoint import read_fp32_state
from dualforce.weights.export import folder_config, tower_state, write_model

pytestmark = pytest.mark.timeout(1200)

ROOT = Path(__file__).resolve().parents[2]
TINY = str(ROOT / "ds_configs" / "runs" / "tiny.json")
FP32 = ROOT / "ds_configs" / "fp32"
STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bucket-runs")
    write_fake_shards(root / "small", clips=6, frames=9, height=4, width=4)
    write_fake_shards(root / "large", clips=4, frames=7, height=8, width=8, seed=50)
    write_fake_shards(root / "foreign", clips=4, frames=7, struct_dim=9, seed=90)
    return root


def arguments(folder: Path, out: str, sets: tuple[str, ...] = ("small", "large"), frames: str = "[9,5]") -> list[str]:
    names = json.dumps([str(folder / name) for name in sets])
    given = [f"data.shards={names}", f"data.frames={frames}", "data.clips_per_step=2", f"train.steps={STEPS}",
             "train.log_every=1", "train.validation_sigmas=2", f"deepspeed={FP32 / 'zero3.json'}"]  # fmt: skip
    return ["--run", TINY, "--out", str(folder / out), *(item for one in given for item in ("--set", one))]


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Outcome]:
    """Every launch of this file, for one import of DeepSpeed."""
    stop, resume = ["--set", "train.stop_at=3"], ["--resume", "--set", "data.workers=1"]
    shared = ["--set", "parallel.sequence=2"]
    launches = [
        Launch("straight", 2, arguments(folder, "straight")),
        Launch("first", 2, [*arguments(folder, "resumed"), *stop]),
        Launch("second", 2, [*arguments(folder, "resumed"), *resume]),
        Launch("shared", 2, [*arguments(folder, "shared"), *shared]),
        Launch("other-order", 2, [*arguments(folder, "resumed", ("large", "small"), "[5,9]"), "--resume"]),
        Launch("foreign", 1, arguments(folder, "bad", ("small", "foreign"))),
        Launch("twice", 1, arguments(folder, "bad", ("small", "small"))),
        Launch("too-long", 1, arguments(folder, "bad", frames="[9,9]")),
        Launch("no-chunk", 1, arguments(folder, "bad", frames="[9,4]")),
        Launch("uneven", 1, arguments(folder, "bad", frames="[9]")),
    ]
    return launch_all(launches)


def test_stop_and_resume_within_a_cycle_of_buckets(outcomes: dict[str, Outcome], folder: Path) -> None:
    for name in ("straight", "first", "second"):
        assert outcomes[name].ok, outcomes[name].show()
    straight, resumed = (read_fp32_state(folder / name) for name in ("straight", "resumed"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert records(folder / "straight", "train") == records(folder / "resumed", "train")
    last = records(folder / "straight", "validation")[-1]
    assert last == records(folder / "resumed", "validation")[-1]
    assert {"video/32px-9f", "video/64px-5f", "struct/64px-5f"} <= last.keys()


def test_the_speed_counts_the_tokens_of_each_step(outcomes: dict[str, Outcome], folder: Path) -> None:
    """Two clips of 9 x (4 + 4) or of 5 x (16 + 4) tokens."""
    assert outcomes["straight"].ok
    lines = [json.loads(line) for line in (folder / "straight" / "metrics.jsonl").read_text().splitlines()]
    rows = [line for line in lines if line["kind"] == "train"]
    tokens = [round(row["tokens_per_second"] * row["seconds_per_step"]) for row in rows]
    assert tokens[:2] == [200, 144] and sorted(set(tokens)) == [144, 200]


def test_ranks_that_share_a_clip_train_the_same(outcomes: dict[str, Outcome], folder: Path) -> None:
    """Losses and gradient norms are those of a clip on each rank; sums are taken in another order, in fp32."""
    assert outcomes["shared"].ok, outcomes["shared"].show()
    for ours, theirs in zip(records(folder / "shared", "train"), records(folder / "straight", "train"), strict=True):
        for key in ("total", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-5), (ours["step"], key)


def test_what_is_exported_says_what_it_was_trained_at(outcomes: dict[str, Outcome], folder: Path) -> None:
    assert outcomes["straight"].ok
    run, model = folder / "straight", folder / "model"
    config = json.loads((run / "config.json").read_text())
    assert config["geometry"]["buckets"] == [{"pixel_size": 32, "frames": 9}, {"pixel_size": 64, "frames": 5}]
    write_model(model, tower_state(read_fp32_state(run)), folder_config(config, str(run)))
    card = (model / "README.md").read_text()
    assert "| pictures | 32 x 32 or 64 x 64 pixels, 25 frames a second |" in card
    assert "| training clips | 9 or 5 latent frames, 2 per chunk after the first |" in card


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other-order", "checkpoint of step 8: shards: "),
        ("foreign", "foreign: extractors.motion.width: 9: expected 8, as in "),
        ("twice", "small: the same clips as "),
        ("too-long", "data.frames = 9: the clips in "),
        ("no-chunk", "data.frames = 4: expected 1 + k * 2"),
        ("uneven", "frames [9]: expected one number, or one for each of 2 sets"),
    ],
)
def test_bad_sets_are_one_line(outcomes: dict[str, Outcome], name: str, message: str) -> None:
    outcome = outcomes[name]
    assert set(outcome.codes) == {2}, outcome.show()
    errors = [line for text in outcome.outputs for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], outcome.show()
