"""Ranks of test_elastic.py; `helpers.launches` calls them. Not a test module."""

from __future__ import annotations

from unittest import mock

from invariants.run_cases import narrow
from torch import Tensor

from dualforce.train.partitions import Piece, Stored


def forgetful() -> None:
    """The narrowed command line where the second moments are left out on loading."""
    copy_to = Stored.copy_to

    def without(self: Stored, target: Tensor, piece: Piece, key: str | None) -> None:
        if key != "exp_avg_sq":
            copy_to(self, target, piece, key)

    with mock.patch.object(Stored, "copy_to", without):
        narrow()
