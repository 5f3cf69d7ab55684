"""Ctrl-C while the command `dualforce` imports its libraries."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Stands in for torch, which takes the longest; what comes after Ctrl-C is never reached.
TORCH = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('went on')\nraise SystemExit(7)\n"


def start(folder: Path, how: signal.Handlers) -> subprocess.CompletedProcess[str]:
    (folder / "torch.py").write_text(TORCH)
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["dualforce"]
    module, _, name = script.partition(":")
    command = [sys.executable, "-P", "-c", f"import sys; from {module} import {name}; sys.exit({name}())"]
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    asked = signal.signal(signal.SIGINT, how)  # which a process hands on, if it is to ignore it
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    finally:
        signal.signal(signal.SIGINT, asked)


def test_the_console_script_ends_at_once(tmp_path: Path) -> None:
    done = start(tmp_path, signal.SIG_DFL)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_command_in_the_background_goes_on(tmp_path: Path) -> None:
    """Where a shell has Ctrl-C ignored."""
    done = start(tmp_path, signal.SIG_IGN)
    assert (done.returncode, done.stdout) == (7, "went on\n")


@pytest.mark.parametrize("how", [signal.SIG_IGN, signal.default_int_handler])
def test_afterwards_it_is_as_it_was(how: signal.Handlers, monkeypatch: pytest.MonkeyPatch) -> None:
    from dualforce import __main__, cli

    seen = []
    monkeypatch.setattr(cli, "main", lambda: seen.append(signal.getsignal(signal.SIGINT)))
    asked = signal.signal(signal.SIGINT, how)
    try:
        __main__.main()
    finally:
        signal.signal(signal.SIGINT, asked)
    assert seen == [how]
