"""Ranks of test_checkpoint_damage.py; `helpers.launches` calls them. Not a test module."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any
from unittest import mock

from deepspeed.runtime.engine import DeepSpeedEngine
from helpers.full_disk import full_after
from invariants.run_cases import narrow
from torch import Tensor

from dualforce.train.partitions import Piece, Stored


def telling() -> None:
    """The narrowed command line; says so as soon as anything is loaded."""
    load, copy_to = DeepSpeedEngine.load_checkpoint, Stored.copy_to

    def load_checkpoint(self: Any, *args: Any, **more: Any) -> Any:
        print("LOADED", flush=True)
        return load(self, *args, **more)

    def copied(self: Stored, target: Tensor, piece: Piece, key: str | None) -> None:
        print("LOADED", flush=True)
        copy_to(self, target, piece, key)

    with mock.patch.object(DeepSpeedEngine, "load_checkpoint", load_checkpoint), \
         mock.patch.object(Stored, "copy_to", copied):  # fmt: skip
        narrow()


def full_disk() -> None:
    """The narrowed command line; the second rank's disk has room for 10 kB a file."""
    with full_after(10_000) if os.environ["RANK"] == "1" else nullcontext():
        narrow()
