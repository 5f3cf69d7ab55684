"""A clip that is found damaged while training ends the ranks that read it with code 2 and one line that names it."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.fake_shards import write_fake_shards
from helpers.launches import Launch, Outcome, launch_all
from safetensors.torch import load, save
from torch import Tensor

from dualforce.data.order import clips_of_step

TINY = Path(__file__).resolve().parents[2] / "ds_configs" / "runs" / "tiny.json"
CLIPS, PER_STEP = 8, 4
INDEX = "train-000000.index.json"


def damage(root: Path, number: int, change: Callable[[Tensor], Tensor]) -> Path:
    """Other video latents in clip `number`, with checksums that agree, as a faulty writer would have left them."""
    index = json.loads((root / INDEX).read_bytes())
    member = index["samples"][number]["members"]["safetensors"]
    with (root / "train-000000.tar").open("r+b") as file:
        file.seek(member["offset"])
        tensors = load(file.read(member["size"]))
        data = save({**tensors, "video": change(tensors["video"])})
        assert len(data) == member["size"]
        file.seek(member["offset"])
        file.write(data)
    member["crc32"] = zlib.crc32(data)
    (root / INDEX).write_text(json.dumps(index))
    manifest = json.loads((root / "manifest.json").read_bytes())
    manifest["files"][INDEX]["sha256"] = hashlib.sha256((root / INDEX).read_bytes()).hexdigest()
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Outcome]:
    """Two ranks that share the damaged clip, and two of which only the second reads it, in the first step."""
    good = write_fake_shards(folder / "good", clips=CLIPS, frames=9)
    second_rank = clips_of_step(0, PER_STEP, CLIPS, seed=0)[PER_STEP - 1].index
    sets = {
        "nan": damage(Path(shutil.copytree(good, folder / "nan")), second_rank, lambda x: x / 0 * 0),
        "shape": damage(
            Path(shutil.copytree(good, folder / "shape")), second_rank, lambda x: x.reshape(9, 16, 2, 8).contiguous()
        ),
    }
    cases = [(name, root, sequence, 0) for name, root in sets.items() for sequence in (1, 2)]
    launches = []
    for name, root, sequence, tolerated in [*cases, ("tolerated", sets["nan"], 2, 1)]:
        values = [f"data.shards={root}", "data.frames=9", f"data.clips_per_step={PER_STEP}", "train.steps=2",
                  "train.validation_sigmas=1", "train.log_every=1", f"parallel.sequence={sequence}",
                  f"data.max_damaged={tolerated}"]  # fmt: skip
        arguments = ["--run", str(TINY), "--out", str(folder / f"run-{name}-{sequence}")]
        arguments += [part for value in values for part in ("--set", value)]
        launches.append(Launch(f"{name}-{sequence}", 2, arguments))
    return launch_all(launches)


@pytest.mark.parametrize(("name", "expected"), [("nan", "not finite"), ("shape", "expected [9, 16, 4, 4]")])
@pytest.mark.parametrize("sequence", [1, 2])
def test_the_clip_is_named_once(outcomes: dict[str, Outcome], name: str, expected: str, sequence: int) -> None:
    outcome = outcomes[f"{name}-{sequence}"]
    errors = [line for text in outcome.outputs for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, outcome.show()
    assert "train-000000.tar: sample 'train-" in errors[0] and ": video: " in errors[0] and expected in errors[0]
    assert outcome.codes[1] == 2 and outcome.codes[0] != 0, outcome.show()
    if sequence == 2:  # without a launcher to end it, a rank that never reads the clip only sees its peer leave
        assert outcome.codes == [2, 2] and "Traceback" not in "".join(outcome.outputs), outcome.show()


def test_a_tolerated_clip_is_replaced_reported_and_counted(outcomes: dict[str, Outcome], folder: Path) -> None:
    """On two ranks that share their clips, and so the damage."""
    outcome, run = outcomes["tolerated-2"], folder / "run-tolerated-2"
    assert outcome.ok, outcome.show()
    (line,) = (run / "damaged-00000.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["step"] == 0 and found["key"] in found["reason"] and "not finite" in found["reason"]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["damaged_clips"] for record in records if record["kind"] == "train"] == [1, 1]
    assert "".join(outcome.outputs).count("damaged clip replaced") == 1
