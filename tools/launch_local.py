"""Train on this machine under the deepspeed launcher: one process per GPU, or `--processes` of them on the CPU.

Everything but `--processes` goes to `dualforce.train`. Other launchers work as well (docs/training.md); this one also
chooses a free port, so that two runs on one machine do not meet.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from dualforce.launch import free_port

CPU_PROCESSES = 2


def gpu_count() -> int:
    """Number of CUDA devices that torch can use."""
    import torch

    return torch.cuda.device_count()


def environment() -> dict[str, str]:
    """Environment of a child process: the checkout is importable, and without a GPU DeepSpeed is told so."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return dict(os.environ) | {"PYTHONPATH": path} | ({} if gpu_count() else {"DS_ACCELERATOR": "cpu"})


def device_options(processes: int, env: dict[str, str]) -> list[str]:
    """Launcher options that choose the devices. The launcher drops CUDA_VISIBLE_DEVICES when it is told a number, so a
    list that is set there is cut to the number of processes in `env` instead."""
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if not visible or "DS_ACCELERATOR" in env:
        return ["--num_gpus", str(processes)]
    env["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:processes])
    return []


def train(processes: int, arguments: list[str]) -> int:
    """Run `dualforce.train` with `arguments` in `processes` processes and return its exit code.

    The launcher is named as a module: its script in `bin/` does not start from a folder with spaces in its name.
    """
    env = environment()
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *device_options(processes, env)]
    options = ["--master_port", str(free_port()), "--log_level", "error"]
    return subprocess.call([*launcher, *options, "--module", "dualforce.train", *arguments], env=env)


def main() -> int:
    """Start the training and return its exit code."""
    parser = argparse.ArgumentParser(prog="tools.launch_local", description=__doc__, allow_abbrev=False)
    parser.add_argument("--processes", type=int, help=f"default: one per GPU, {CPU_PROCESSES} without a GPU")
    options, arguments = parser.parse_known_args()
    gpus = gpu_count()
    processes = (gpus or CPU_PROCESSES) if options.processes is None else options.processes
    if processes < 1 or (gpus and processes > gpus):
        parser.error(f"--processes {processes}: expected 1 to {gpus or 'the number of cores'}")
    return train(processes, arguments)


if __name__ == "__main__":
    sys.exit(main())
