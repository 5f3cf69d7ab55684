"""Many multi-process launches for the price of one import of DeepSpeed.

`launch_all` starts one interpreter that imports everything once and then forks the ranks of each launch in turn.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "dualforce.train.__main__:main"


@dataclass(frozen=True)
class Launch:
    """`world` ranks that call `target` ("module:function") with `arguments` as the command line."""

    name: str
    world: int
    arguments: list[str]
    target: str = TRAIN


@dataclass(frozen=True)
class Outcome:
    """Exit codes by rank, and what the ranks wrote (stdout and stderr together)."""

    codes: list[int]
    outputs: list[str]

    @property
    def ok(self) -> bool:
        return all(code == 0 for code in self.codes)

    def show(self) -> str:
        return f"exit codes {self.codes}\n" + "\n".join(text[-3000:] for text in self.outputs)


def launch_all(launches: list[Launch], timeout: float = 1700) -> dict[str, Outcome]:
    """Run the launches one after the other; raises RuntimeError when the runner itself dies."""
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "launches.json"
        job.write_text(json.dumps([asdict(launch) for launch in launches]))
        environment = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        done = subprocess.run(
            [sys.executable, "-m", "helpers.launches", str(job)],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        result = Path(folder) / "outcomes.json"
        if not result.exists():
            raise RuntimeError(f"the launcher died with code {done.returncode}:\n{done.stderr[-4000:]}")
        return {name: Outcome(**outcome) for name, outcome in json.loads(result.read_text()).items()}


def _rank(launch: Launch, rank: int, port: int, output: Path) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(launch.world), LOCAL_WORLD_SIZE=str(launch.world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    sys.argv = [launch.target, *launch.arguments]
    module, function = launch.target.split(":")
    code = 0
    try:
        getattr(importlib.import_module(module), function)()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(launch: Launch, folder: Path) -> Outcome:
    context, port = multiprocessing.get_context("fork"), _free_port()
    files = [folder / f"{launch.name.replace('/', '_')}-{rank}.log" for rank in range(launch.world)]
    ranks = [context.Process(target=_rank, args=(launch, rank, port, files[rank])) for rank in range(launch.world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(600)
        if process.exitcode is None:
            process.kill()
            process.join()
    outputs = [file.read_text(errors="replace") if file.exists() else "" for file in files]
    return Outcome([process.exitcode if process.exitcode is not None else -1 for process in ranks], outputs)


def _main() -> None:
    job = Path(sys.argv[1])
    launches = [Launch(**values) for values in json.loads(job.read_text())]
    for name in ("deepspeed", "deepspeed.ops", "dualforce.train.loop", "dualforce.train.setup"):
        importlib.import_module(name)
    outcomes = {launch.name: asdict(_run(launch, job.parent)) for launch in launches}
    (job.parent / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    _main()
