"""The step benchmark's inputs, without a GPU."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.fake_shards import write_fake_shards

from data_shards.reader import ShardSet
from dualforce.config import RunConfig, validate
from dualforce.model.path import ChunkRule
from dualforce.train.setup import model_config
from dualforce.train.step import StepContext
from megatron_ext.kernels.kernel_set import select_kernels
from megatron_ext.parallel.grid import ProcessGrid
from tools import bench_step
from tools.bench.clips import ClipSize, shard_source, synthetic_source
from tools.bench.trace import Span, busy_ms, gaps
from tools.bench_step import parser

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return ShardSet.open(write_fake_shards(tmp_path_factory.mktemp("shards"), clips=6, frames=5))


def context(run: RunConfig, rank: int = 0, world: int = 1, sp: int = 1) -> StepContext:
    grid = ProcessGrid(world, rank, sp, torch.device("cpu"))
    return StepContext(run, grid, select_kernels("reference", grid.device, torch.float32), ChunkRule(1, None, 0))


def run_of(frames: int, clips: int) -> RunConfig:
    values = {"preset": "tiny", "deepspeed": "x", "model": {"frames_per_chunk": 1}, "train": {"steps": 9},
              "data": {"frames": frames, "clips_per_step": clips}}  # fmt: skip
    return validate(RunConfig, values, "test")


def test_ranks_of_a_group_share_synthetic_clips_and_groups_do_not(shards: ShardSet) -> None:
    run = run_of(4, 2)
    model = model_config(run, [shards.manifest])
    contexts = [context(run, rank, 4, 2) for rank in range(4)]
    firsts = [next(synthetic_source(model, one, sizes=[ClipSize(4, 4, 6)], text_tokens=3).steps) for one in contexts]
    frames = [step[0][0].noised.video for step in firsts]
    assert [tuple(x.shape) for x in frames] == [(1, 2, 16, 4, 6)] * 4  # two of four frames each
    assert firsts[0][0][0].cond.text.shape == (1, 3, model.video.text_dim)
    assert torch.equal(firsts[0][0][0].cond.reference, firsts[1][0][0].cond.reference)
    assert not torch.equal(frames[0], frames[1]) and not torch.equal(frames[0], frames[2])


def test_sizes_of_clips_take_turns(shards: ShardSet) -> None:
    run = run_of(4, 1)
    source = synthetic_source(
        model_config(run, [shards.manifest]), context(run), sizes=[ClipSize(4, 4, 6), ClipSize(2, 8, 8)], text_tokens=3
    )
    clips = [step[0][0].noised.video for step in itertools.islice(source.steps, 4)]
    assert [tuple(clip.shape[1:]) for clip in clips] == [(4, 16, 4, 6), (2, 16, 8, 8)] * 2
    assert not torch.equal(clips[0], clips[2])


def test_real_clips_come_through_the_loader(shards: ShardSet) -> None:
    run = run_of(5, 2)
    model = model_config(run, [shards.manifest])
    source = shard_source(shards, model, context(run, 1, 2), steps=4)
    steps = list(itertools.islice(source.steps, 5))
    assert len(steps) == 4 and all(len(step) == 1 for step in steps)
    assert steps[0][0][0].noised.video.shape == (1, 5, 16, 4, 4)
    assert source.waited() > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "ours,best"], "--rows ours,best: best: expected some of"),
        (["--latent", "63x64"], "--latent 63x64: expected two even numbers"),
        (["--also", "9x96"], "--also 9x96: expected frames and two even numbers each"),
        (["--also", "9x96x96,0x64x64"], "--also 9x96x96,0x64x64: expected frames"),
        (["--sequence", "5"], "parallel.sequence = 5: does not divide video.heads = 12, struct.heads = 12"),
        (["--shards", "nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "tools.bench_step", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ") and message in done.stderr


def test_defaults_are_the_documented_ones() -> None:
    options = parser().parse_args([])
    assert (options.preset, options.frames, options.latent, options.rows) == ("mova-lite", 20, "64x64", "ours")


def test_idle_times_are_what_nothing_covers() -> None:
    spans = [Span(0, 10, "a"), Span(2, 4000, "b"), Span(5, 6, "c"), Span(5000, 7000, "d"), Span(7500, 8000, "e")]
    assert busy_ms(spans) == 6.5
    assert gaps(spans) == [(1.0, 4.0, "b", "d"), (0.5, 7.0, "d", "e")]


def row(name: str, **other: object) -> dict[str, object]:
    only = {"row": name, "ms": 1.0, "losses": [3.0, 2.0, 1.0], "norms": [1.0, 1.0, 1.0]} | other
    return {"machine": {"device": "none", "gpus": 1}, "matmul_tflops": 800.0, "rows": [only]}


def test_rows_that_agree_are_shown_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = {"ours": row("ours"), "usual": row("usual", losses=[3.01, 2.0, 1.0]), "plan": row("plan", ms=None)}
    for lost in ("losses", "norms"):
        del made["plan"]["rows"][0][lost]  # type: ignore[index,attr-defined]  # it ran out of memory
    monkeypatch.setattr(bench_step, "_child", lambda name, *_: made[name])
    content = bench_step._in_turn(list(made), parser().parse_args([]))
    assert [found["row"] for found in content["rows"]] == list(made)
    assert "usual" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"losses": [3.0, 2.0, 1.1]}, {"norms": [1.0, 1.2, 1.0]}])
def test_a_row_that_computes_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, list[float]]
) -> None:
    made = {"ours": row("ours"), "usual": row("usual", **wrong)}
    monkeypatch.setattr(bench_step, "_child", lambda name, *_: made[name])
    with pytest.raises(SystemExit, match=r"usual: (losses|norms) .* are not those of ours"):
        bench_step._in_turn(list(made), parser().parse_args([]))
