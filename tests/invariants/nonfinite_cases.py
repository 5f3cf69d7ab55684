"""Ranks of test_nonfinite.py; `helpers.launches` calls them. Not a test module."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import torch
from invariants.run_cases import narrow

from dualforce.losses.total import total_loss
from dualforce.train import train_module
from dualforce.types import LossTerms

STEP = 4  # from 1


def not_a_number() -> None:
    """The narrowed command line; in one step the loss of the last rank is not a number."""
    last = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)

    def spoilt(sums: Any, counts: Any, config: Any, step: int, world: int) -> LossTerms:
        terms = total_loss(sums, counts, config, step, world)
        wrong = last and step == STEP - 1 and torch.is_grad_enabled()
        return terms._replace(total=terms.total * float("nan")) if wrong else terms

    with mock.patch.object(train_module, "total_loss", spoilt):
        narrow()
