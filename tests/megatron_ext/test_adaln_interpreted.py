"""The Triton kernels of the AdaLN family, interpreted on the CPU in one process of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_interpreted_kernels() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    cases = "tests/megatron_ext/interpreted_adaln.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
