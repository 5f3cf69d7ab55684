"""How the modules that own parameters are held, decided from outside the model."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

# Builds a module, or what stands for it when called: each is called once for every module that is gathered as a whole.
Place = Callable[[Callable[[], nn.Module]], nn.Module]


def in_place(build: Callable[[], nn.Module]) -> nn.Module:
    """The module as it is."""
    return build()
