"""AdamW in one pass, interpreted on the CPU in one process of its own."""

from __future__ import annotations

from helpers.interpreted import run_interpreted


def test_interpreted_kernel() -> None:
    run_interpreted("tests/megatron_ext/interpreted_adamw.py")
