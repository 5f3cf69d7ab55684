"""The Triton kernels of the AdaLN family, interpreted on the CPU in one process of their own."""

from __future__ import annotations

from helpers.interpreted import run_interpreted


def test_interpreted_kernels() -> None:
    run_interpreted("tests/megatron_ext/interpreted_adaln.py")
