"""Ranks that refuse a run end alike: one line, one exit code, whoever comes last; none waits for one that has died."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.fake_shards import write_fake_shards
from helpers.launches import TRAIN, Launch, Outcome, launch_all

TINY = Path(__file__).resolve().parents[2] / "ds_configs" / "runs" / "tiny.json"
CLIPS = "data.clips_per_step = 3: expected a multiple of the 2 data-parallel ranks"
# Ranks' code, what is set for them, their exit codes and the line.
CASES = {
    "late": ("helpers.late_ranks:late", "data.clips_per_step=3", [2, 2], CLIPS),
    "dead": ("helpers.late_ranks:dead", "data.clips_per_step=3", [2, 7], CLIPS),
    "lacking": ("helpers.late_ranks:lacking", "train.steps=1", [2, 2], "data.video_codec = /here: no such folder"),
    "never-met": (TRAIN, "parallel.sequence=4", [2, 2], "parallel.sequence = 4: expected a divisor of the world size"),
    "file": (TRAIN, "deepspeed=nowhere.json", [2, 2], "nowhere.json: no such file"),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("refused")
    shards = write_fake_shards(folder / "shards", clips=4, frames=5)
    common = ["--run", str(TINY), "--set", f"data.shards={shards}", "--set", "data.frames=5"]
    cases = {name: (target, setting) for name, (target, setting, _, _) in CASES.items()}
    cases["alone"] = ("helpers.late_ranks:alone", "train.steps=1")
    return launch_all([
        Launch(name, 2, [*common, "--out", str(folder / name), "--set", setting], target)
        for name, (target, setting) in cases.items()
    ])  # fmt: skip


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_all_ranks_end_with_one_line(outcomes: dict[str, Outcome], name: str) -> None:
    _, _, codes, message = CASES[name]
    outcome = outcomes[name]
    assert outcome.codes == codes, outcome.show()
    written = [line for text in outcome.outputs for line in text.splitlines()]
    errors = [line for line in written if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], outcome.show()
    assert not [line for line in written if "Traceback" in line or "onnection" in line], outcome.show()


def test_a_rank_that_ends_for_a_reason_of_its_own_tells_it(outcomes: dict[str, Outcome]) -> None:
    """The other one only sees it leave; a launcher ends it."""
    outcome = outcomes["alone"]
    assert outcome.codes[1] == 2 and "error: of this rank alone" in outcome.outputs[1].splitlines(), outcome.show()
    assert outcome.codes[0] != 0 and "error: " not in outcome.outputs[0], outcome.show()
