"""Which layers have a bridge (model reference 4.2)."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.tiny_model import kernels, tiny_config

from dualforce.config import ConfigError
from dualforce.model.bridge import bridge_layers
from dualforce.model.dual_tower import DualTower


def layers_of(depth: int, choice: Any, video_depth: int | None = None) -> tuple[int, ...]:
    config = tiny_config(
        video={"layers": video_depth or depth}, struct={"layers": depth}, audio={"layers": 0}, bridge={"layers": choice}
    )
    return bridge_layers(config)


@pytest.mark.parametrize(
    ("depth", "choice", "wanted"),
    [
        (20, "shallow_focus", range(6)),
        (30, "shallow_focus", range(10)),
        (60, "shallow_focus", range(10)),
        (2, "shallow_focus", [0]),
        (20, "distributed", [0, 3, 6, 9, 12, 15, 18]),
        (4, "distributed", [0, 3]),
        (20, "progressive", [0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 14, 17]),
        (5, "progressive", range(5)),
        (20, "custom", [0, 2, 4, 6, 8, 12, 16]),
        (30, "custom", [0, 2, 4, 6, 8, 12, 16, 20]),
        (3, "custom", [0, 2]),
        (30, "full", range(30)),
        (20, 4, range(4)),
        (20, 20, range(20)),
        (20, [7, 3, 3], [3, 7]),
    ],
)
def test_choice(depth: int, choice: Any, wanted: Any) -> None:
    assert layers_of(depth, choice) == tuple(wanted)


def test_depth_is_that_of_the_shallower_tower() -> None:
    assert layers_of(30, "full", video_depth=40) == tuple(range(30))
    assert layers_of(6, "shallow_focus", video_depth=30) == (0, 1)


@pytest.mark.parametrize("choice", [0, -1, 4, [], [-1], [0, 3], [1, 9]])
def test_a_layer_that_a_tower_lacks_is_an_error(choice: Any) -> None:
    with pytest.raises(ConfigError, match=r"bridge.layers = .*expected layers among the 3"):
        layers_of(3, choice)


def test_direction_none_has_no_layers_and_no_weights() -> None:
    config = tiny_config(bridge={"layers": "full", "directions": "none"})
    assert bridge_layers(config) == ()
    assert not any("bridge" in name for name, _ in DualTower(config, kernels()).named_parameters())


def test_the_model_has_the_chosen_layers() -> None:
    model = DualTower(tiny_config(bridge={"layers": [0, 2]}), kernels())
    assert [hasattr(layer, "bridge") for layer in model.layers] == [True, False, True]
