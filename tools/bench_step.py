"""Time whole training steps of a preset, the project's way and as one would train without it.

    deepspeed --num_gpus 4 --module tools.bench_step --sequence 4 --frames 20 --rows ours,fsdp2
    python -m tools.bench_step --frames 20

One clip a data-parallel rank. TFLOP/s count three forwards of unmasked model FLOPs, without recomputation. A row is
printed only if losses and gradient norms of its first steps agree with those of the first row: weights, noise and clips
are the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_shards.reader import ShardSet
from dualforce import launch
from dualforce.config import ConfigError, ModelOverrides, RunConfig, validate
from dualforce.presets import build_model_config
from dualforce.train.setup import model_config
from megatron_ext.parallel.grid import ProcessGrid, check_heads
from tools.bench import recipes
from tools.bench.clips import ClipSize
from tools.bench.rates import matmul_tflops
from tools.bench.step_row import Subject, measure
from tools.bench.table import show, write_json

ROOT = Path(__file__).resolve().parent.parent
# bf16 carries 8 bits: two ways to compute one model differ by some 2^-8 in a prediction, far less in a mean over
# millions of them; a norm adds up the errors of gradients that pass through every layer. A dropped mask moves both.
BOUNDS = {"losses": 0.01, "norms": 0.05}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="tools.bench_step", description=__doc__.split("\n")[0])
    made.add_argument("--preset", default="mova-lite")
    made.add_argument("--frames", type=int, default=20, help="latent frames of a clip")
    made.add_argument("--latent", default="64x64", help="latent height x width; 2x2 makes the arithmetic trivial")
    made.add_argument("--also", default="", help="further sizes of clips by turns, for example 9x96x96,9x64x64")
    made.add_argument("--text", type=int, default=512, help="text tokens")
    made.add_argument("--shards", type=Path, help="read this shard set (its latent size and text) with the real loader")
    made.add_argument("--sequence", type=int, default=1, help="ranks that share a clip")
    made.add_argument("--rows", default="ours", help=f"comma-separated, of {', '.join(recipes.NAMES)}")
    made.add_argument("--recompute", default="none", choices=("none", "selective", "full", "offload"))
    made.add_argument("--steps", type=int, default=8)
    made.add_argument("--deepspeed", type=Path, default=ROOT / "ds_configs" / "zero3.json")
    made.add_argument("--json", type=Path, help="file for the rows")
    made.add_argument("--profile", type=_path, help="file for the costliest kernels and idle times of the first row")
    made.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    made.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return made


def main() -> None:
    """Measure the rows; rank 0 prints. Exit code 2 and one line for a wrong input."""
    options = parser().parse_args()
    names = options.rows.split(",")
    try:
        wrong = [name for name in names if name not in recipes.NAMES]
        if wrong:
            raise ConfigError(f"--rows {options.rows}: {wrong[0]}: expected some of {', '.join(recipes.NAMES)}")
        subject = _subject(options)
        heads = {"video.heads": subject.model.video.heads, "struct.heads": subject.model.struct.heads}
        check_heads(options.sequence, heads)
        if not torch.cuda.is_available():
            raise ConfigError("tools.bench_step: no CUDA device: expected an NVIDIA GPU")
        content = _in_turn(names, options) if len(names) > 1 else _alone(names[0], options, subject)
    except ValueError as error:
        if launch.is_main():
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if launch.is_main():
        if not options.child:
            _show(content)
        if options.json:
            write_json(options.json, content)


def _alone(name: str, options: argparse.Namespace, subject: Subject) -> dict[str, Any]:
    """The content of the JSON file with one row, measured in this process and its peers."""
    grid = launch.start(options.sequence, seed=0)
    run = _run(options, grid.dp)
    matmul = _slowest(matmul_tflops(), grid)
    row = measure(name, options, subject, run, grid, matmul)
    launch.finish()
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "gpus": grid.world}
    return {"machine": machine, "matmul_tflops": matmul, "options": _plain(options), "rows": [row]}


def _in_turn(names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """The same with several rows, each measured in processes of its own: what one recipe compiled, reserved and did
    not give back is nothing to the next. A row that disagrees with the first ends the command."""
    content: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for index, name in enumerate(names):
            file = Path(folder) / f"{index}.json"
            found = _child(name, index, file)
            if not launch.is_main():
                continue
            for kind, bound in BOUNDS.items():
                first, row = content.get("rows", found["rows"])[0], found["rows"][0]
                if kind in row and kind in first and not _agree(row[kind], first[kind], bound):
                    raise SystemExit(f"{name}: {kind} {row[kind]} are not those of {names[0]}, {first[kind]}")
            content = {**found, "options": _plain(options), "rows": content.get("rows", []) + found["rows"]}
            _show(content)
    return content


def _child(name: str, index: int, file: Path) -> dict[str, Any]:
    """Run one row in a process of this rank; what it wrote, on the first rank."""
    command = [sys.executable, "-m", "tools.bench_step", *sys.argv[1:], "--rows", name, "--json", str(file), "--child"]
    if index:
        command += ["--profile", ""]
    done = subprocess.run(command, env=launch.child_environment(index), cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{name}: ended with code {done.returncode}")
    return dict(json.loads(file.read_text())) if launch.is_main() else {}


def _show(content: dict[str, Any]) -> None:
    rows = [{k: v for k, v in row.items() if k not in BOUNDS} for row in content["rows"]]
    print(show(_title(content), rows), flush=True)


def _subject(options: argparse.Namespace) -> Subject:
    if options.shards is None:
        changes = ModelOverrides(frames_per_chunk=1)
        model = build_model_config(options.preset, struct_dim=70, audio_dim=1024, overrides=changes)
        return Subject(model, _sizes(options), options.text, None)
    if options.also:
        raise ConfigError(f"--also {options.also}: not with --shards, whose clips have one size")
    shards = ShardSet.open(options.shards)
    video, text = (shards.manifest["extractors"].get(name) for name in ("video", "text"))
    if text is not None:
        raise ConfigError(f"--shards {options.shards}: has text of any length: expected a set without, to count FLOPs")
    size = ClipSize(options.frames, video["height"], video["width"])
    return Subject(model_config(_run(options, 1), [shards.manifest]), (size,), 1, shards)


def _run(options: argparse.Namespace, clips: int) -> RunConfig:
    values = {
        "preset": options.preset,
        "deepspeed": str(options.deepspeed),
        "model": {"frames_per_chunk": 1},
        "data": {
            "frames": options.frames, "clips_per_step": clips, "max_micro_batch": 1,
            **({} if options.shards is None else {"shards": str(options.shards)}),
        },
        "parallel": {"sequence": options.sequence, "recompute": options.recompute},
        "train": {"steps": 10_000},
    }  # fmt: skip
    return validate(RunConfig, values, "tools.bench_step")


def _slowest(rate: float, grid: ProcessGrid) -> float:
    """The rate of the slowest rank: that is who the others wait for."""
    found = torch.tensor([rate], device=grid.device)
    if grid.world > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return float(found)


def _agree(found: list[float], first: list[float], bound: float) -> bool:
    return all(abs(a - b) <= bound * abs(b) for a, b in zip(found, first, strict=True))


def _path(text: str) -> Path | None:
    return Path(text) if text else None


def _sizes(options: argparse.Namespace) -> tuple[ClipSize, ...]:
    """What --frames, --latent and --also say."""
    latent = _numbers(options.latent)
    if len(latent) != 2 or not _even(latent):
        raise ConfigError(f"--latent {options.latent}: expected two even numbers, for example 64x64")
    also = [_numbers(text) for text in options.also.split(",") if text]
    if not all(len(size) == 3 and size[0] > 0 and _even(size[1:]) for size in also):
        raise ConfigError(f"--also {options.also}: expected frames and two even numbers each, for example 9x96x96")
    return ClipSize(options.frames, *latent), *(ClipSize(*size) for size in also)


def _numbers(text: str) -> list[int]:
    return [int(part) if part.isdigit() else 0 for part in text.split("x")]


def _even(sides: list[int]) -> bool:
    return all(side > 0 and side % 2 == 0 for side in sides)


def _title(content: dict[str, Any]) -> str:
    options, machine = content["options"], content["machine"]
    also = f" and {options['also']} by turns" if options["also"] else ""
    return (
        f"{options['preset']}, {options['frames']} frames of {options['latent']}{also}, {machine['gpus']} x "
        f"{machine['device']}, SP {options['sequence']}, recompute {options['recompute']}, "
        f"matmul {content['matmul_tflops']:.0f} TFLOP/s"
    )


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


if __name__ == "__main__":
    main()
