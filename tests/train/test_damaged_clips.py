"""A clip that is found damaged while training ends the ranks that read it with code 2 and one line that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.fake_shards import write_fake_shards
from helpers.launches import TRAIN, Launch, Outcome, launch_all
from helpers.shard_edits import locate, replace_bytes
from safetensors.torch import load, save
from torch import Tensor

from data_shards.reader import ShardSet
from dualforce.data.order import ClipOrder

TINY = Path(__file__).resolve().parents[2] / "ds_configs" / "runs" / "tiny.json"
CLIPS, PER_STEP, DAMAGED, LATER = 8, 4, 5, 2


def damage(root: Path, number: int, change: Callable[[Tensor], Tensor]) -> Path:
    """Other video latents in clip `number`, with checksums that agree, as a faulty writer would have left them."""
    member = locate(root)[number].payload
    data = (root / "train-000000.tar").read_bytes()[member.offset : member.offset + member.size]
    tensors = load(data)
    replace_bytes(root, "train-000000.tar", number, "payload", save({**tensors, "video": change(tensors["video"])}))
    return root


def seed_with_the_last(root: Path) -> int:
    """A seed with which the first step ends with the damaged clip, so that of two ranks only the second reads it, and
    LATER comes in the second step, and not as the clip that takes the damaged one's place."""
    for seed in range(10_000):
        order = ClipOrder(ShardSet.open(root).hash, seed, CLIPS)
        first, second = ([ref.index for ref in order.clips_of_step(step, PER_STEP)] for step in (0, 1))
        if first[-1] == DAMAGED and LATER in second[1:]:
            return seed
    raise AssertionError("no such seed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


# The name, how many clips may be damaged, ranks, and the rest of the command line.
RESUMED = (
    ("begun", 1, 2, ("--set", "train.stop_at=1")),
    ("too-many", 1, 1, ("--resume",)),
    ("too-few", 0, 1, ("--resume",)),
    ("raised", 2, 1, ("--resume",)),
)


def begun_and_resumed(folder: Path, root: Path, name: str, tolerated: int, world: int, more: tuple[str, ...]) -> Launch:
    """One run, begun on two ranks and resumed on one, on a set with a damaged clip in each of its two steps."""
    values = [f"data.shards={root}", "data.frames=9", f"data.clips_per_step={PER_STEP}", "train.steps=2",
              "train.validation_sigmas=1", "train.log_every=1", f"data.max_damaged={tolerated}",
              f"train.seed={seed_with_the_last(root)}"]  # fmt: skip
    arguments = ["--run", str(TINY), "--out", str(folder / "run-resumed"), *more]
    return Launch(name, world, arguments + [part for value in values for part in ("--set", value)])


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Outcome]:
    """Two ranks that share the damaged clip, and two of which only the second reads it, in the first step."""
    good = write_fake_shards(folder / "good", clips=CLIPS, frames=9)
    sets = {
        "nan": damage(Path(shutil.copytree(good, folder / "nan")), DAMAGED, lambda x: x / 0 * 0),
        "shape": damage(
            Path(shutil.copytree(good, folder / "shape")), DAMAGED, lambda x: x.reshape(9, 16, 2, 8).contiguous()
        ),
    }
    twice = damage(Path(shutil.copytree(sets["nan"], folder / "twice")), LATER, lambda x: x / 0 * 0)
    cases = [(name, root, sequence, 0) for name, root in sets.items() for sequence in (1, 2)]
    launches = [begun_and_resumed(folder, twice, *case) for case in RESUMED]
    for name, root, sequence, tolerated in [*cases, ("tolerated", sets["nan"], 2, 1), ("killed", good, 1, 0)]:
        workers = 2 if name in ("tolerated", "killed") else 0
        values = [f"data.shards={root}", "data.frames=9", f"data.clips_per_step={PER_STEP}", "train.steps=2",
                  "train.validation_sigmas=1", "train.log_every=1", f"parallel.sequence={sequence}",
                  f"data.max_damaged={tolerated}", f"data.workers={workers}",
                  f"train.seed={seed_with_the_last(root)}"]  # fmt: skip
        arguments = ["--run", str(TINY), "--out", str(folder / f"run-{name}-{sequence}")]
        arguments += [part for value in values for part in ("--set", value)]
        target = "helpers.killed_loader:main" if name == "killed" else TRAIN
        launches.append(Launch(f"{name}-{sequence}", 1 if name == "killed" else 2, arguments, target))
    return launch_all(launches)


@pytest.mark.parametrize(("name", "expected"), [("nan", "video: 2304 values"), ("shape", "another header: ")])
@pytest.mark.parametrize("sequence", [1, 2])
def test_the_clip_is_named_once(outcomes: dict[str, Outcome], name: str, expected: str, sequence: int) -> None:
    outcome = outcomes[f"{name}-{sequence}"]
    errors = [line for text in outcome.outputs for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.show()
    assert "train-000000.tar: sample 'train-" in errors[0] and expected in errors[0]
    assert outcome.codes[1] == 2 and outcome.codes[0] != 0, outcome.show()
    if sequence == 2:  # without a launcher to end it, a rank that never reads the clip only sees its peer leave
        assert outcome.codes == [2, 2] and "Traceback" not in "".join(outcome.outputs), outcome.show()


def test_a_tolerated_clip_is_replaced_reported_and_counted(outcomes: dict[str, Outcome], folder: Path) -> None:
    """On two ranks that share their clips, and so the damage, with loader processes."""
    outcome, run = outcomes["tolerated-2"], folder / "run-tolerated-2"
    assert outcome.ok, outcome.show()
    (line,) = (run / "damaged-00000.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found.pop("reason").endswith("expected finite numbers")
    assert found == {"step": 0, "bucket": 0, "shard": "train-000000.tar", "key": "train-0005", "member": "video"}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["damaged_clips"] for record in records if record["kind"] == "train"] == [1, 1]
    assert "".join(outcome.outputs).count("damaged clip replaced") == 1


def test_a_killed_loader_process_ends_the_run_with_one_line(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["killed-1"]
    (error,) = (line for line in outcome.outputs[0].splitlines() if line.startswith("error: "))
    assert "data.workers: loader process 1 of 2 (pid " in error and "ended by SIGKILL" in error
    assert outcome.codes == [2] and "Traceback" not in outcome.outputs[0], outcome.show()


def test_damage_is_counted_over_a_resume(outcomes: dict[str, Outcome], folder: Path) -> None:
    """On other ranks than those that met it; and who knows of the damage may raise the limit of a run that it ended."""
    assert outcomes["begun"].ok, outcomes["begun"].show()
    for name, expected in (
        ("too-many", "video: 2304 values that are not finite, the first at [0, 0, 0, 0]: expected finite numbers; "
                     "1 before it: expected no more than data.max_damaged"),
        ("too-few", "data.max_damaged: 0: expected at least 1, the damaged clips of the first 1 steps of "),
    ):  # fmt: skip
        (error,) = (line for line in outcomes[name].outputs[0].splitlines() if line.startswith("error: "))
        assert expected in error and outcomes[name].codes == [2], outcomes[name].show()
    assert outcomes["raised"].ok, outcomes["raised"].show()
    run = folder / "run-resumed"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["damaged_clips"] for record in records if record["kind"] == "train"] == [1, 2]
    files = [run / f"damaged-{rank:05d}.jsonl" for rank in (0, 1)]
    told = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert [(one["step"], one["key"]) for one in told] == [(1, "train-0002"), (0, "train-0005")]
