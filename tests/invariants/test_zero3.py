"""The project's ZeRO-3 step gives what DeepSpeed's own gives, and few parameters are whole at once."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from helpers.launches import Launch, launch_all
from invariants.zero3_cases import CLIP, LAYERS, SPOILT, STEPS

pytestmark = pytest.mark.timeout(600)

CASES = ["fp32 x1", "bf16 x1", "bf16 x2"]
OWN = ["ours", "one-pass"]  # the second with AdamW in the same pass, as on a GPU


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("zero3") / "measured.json"
    outcome = launch_all([Launch("zero3", 2, [str(out)], "invariants.zero3_cases:main")])["zero3"]
    assert outcome.ok, outcome.show()
    return json.loads(out.read_text())


@pytest.mark.parametrize("step", OWN)
@pytest.mark.parametrize("case", CASES)
def test_step_is_that_of_deepspeed(measured: dict[str, Any], case: str, step: str) -> None:
    ours, theirs = measured[f"{step} {case}"], measured[f"deepspeed {case}"]
    finite = [norm for number, norm in enumerate(theirs["norms"]) if number != SPOILT]
    assert all(norm > 2 * CLIP for norm in finite)  # clipping was at work
    # Sums in another order: a rounding of fp32 in the norm, which scales every gradient; AdamW's first update depends
    # on such a scale through eps alone.
    assert math.isclose(ours["norms"][0], theirs["norms"][0], rel_tol=3e-7)
    for a, b in zip(ours["first"], theirs["first"], strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-6, atol=1e-7)
    # Later a weight may fall to the other side of a rounding of bf16, 2^-9 of itself, and training amplifies that.
    pairs = zip(ours["norms"], theirs["norms"], strict=True)
    assert all(a == b or math.isclose(a, b, rel_tol=1e-2) for a, b in pairs)


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("case", CASES)
def test_step_without_finite_gradients_is_left_out(measured: dict[str, Any], case: str, own: str) -> None:
    expected = [step != SPOILT for step in range(STEPS)]
    assert measured[f"{own} {case}"]["moved"] == expected
    assert not math.isfinite(measured[f"{own} {case}"]["norms"][SPOILT])


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("case", CASES)
def test_the_model_has_the_new_weights(measured: dict[str, Any], case: str, own: str) -> None:
    assert measured[f"{own} {case}"]["copied"]


@pytest.mark.parametrize("case", CASES)
def test_at_most_three_layers_of_eight_are_whole(measured: dict[str, Any], case: str) -> None:
    """The one at work, the next, and one that is being fetched or let go; vectors are kept whole."""
    row = measured[f"ours {case}"]
    assert row["unit"] < row["whole"] <= 3.5 * row["unit"]


@pytest.mark.parametrize(
    ("case", "a_layer"), [("ours fp32 x1", 2), ("ours bf16 x1", 2), ("ours bf16 x2", 0), ("deepspeed bf16 x1", 0)]
)
def test_gradients_go_straight_to_their_place(measured: dict[str, Any], case: str, a_layer: int) -> None:
    """Matrices and vectors, where they are not added to those of other clips and are kept in their own dtype."""
    assert measured[case]["straight"] == a_layer * LAYERS * STEPS
