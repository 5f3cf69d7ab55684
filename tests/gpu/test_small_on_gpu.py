"""`small` in bf16 under ZeRO-3 on one GPU and on two with sequence parallelism; export; five seconds of video."""

from __future__ import annotations

import json
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from dualforce.codecs.media import read_audio, read_video
from tools.demo_inputs import png

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20


def command(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def shards(folder: Path, sample_dir: Path) -> Path:
    arguments = (str(sample_dir), "--out", str(folder / "shards"), "--workers", "4")
    command("-m", "dualforce.cli", "data", "build", *arguments)
    return folder / "shards"


@pytest.fixture(scope="module")
def engine_file(folder: Path) -> Path:
    """The bf16 ZeRO-3 file with a warm-up that fits twenty steps."""
    config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    config["optimizer"]["params"]["lr"] = 2e-4
    config["scheduler"]["params"]["warmup_num_steps"] = 4
    (folder / "zero3.json").write_text(json.dumps(config))
    return folder / "zero3.json"


def train(
    folder: Path, shards: Path, engine_file: Path, gpus: int, name: str | None = None, more: tuple[str, ...] = ()
) -> list[float]:
    """Losses of twenty steps with one rank a GPU and sequence parallelism over all of them."""
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"{torch.cuda.device_count()} CUDA devices, {gpus} needed")
    out = folder / (name or f"run-{gpus}")
    if not out.exists() or more:
        values = [f"data.shards={shards}", f"deepspeed={engine_file}", f"train.steps={STEPS}", "train.log_every=1",
                  "data.frames=9", "data.clips_per_step=4", "data.max_micro_batch=4", "train.validate_every=1000",
                  "train.validation_sigmas=4", f"parallel.sequence={gpus}"]  # fmt: skip
        sets = [item for value in values for item in ("--set", value)]
        command("-m", "tools.launch_local", "--processes", str(gpus), "--run", str(ROOT / "ds_configs/runs/small.json"),
                "--out", str(out), *sets, *more)  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["total"] for line in lines if line["kind"] == "train"]


@pytest.mark.timeout(900)
def test_one_gpu_learns(folder: Path, shards: Path, engine_file: Path) -> None:
    losses = train(folder, shards, engine_file, 1)
    assert len(losses) == STEPS
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


@pytest.mark.timeout(900)
def test_two_gpus_agree_with_one(folder: Path, shards: Path, engine_file: Path) -> None:
    """Same clips, noise and start. bf16 carries 8 bits, so a forward differs by about 2^-9 of its value where sums are
    taken in another order, and twenty AdamW steps on slightly different gradients drift apart further: 2 % bounds it
    with room, while a wrong gradient scale or another clip on one rank moves the losses by tens of per cent."""
    one, two = (train(folder, shards, engine_file, gpus) for gpus in (1, 2))
    assert np.mean(two[-5:]) < 0.9 * np.mean(two[:5])
    print("one GPU", [round(x, 4) for x in one])
    print("two GPUs", [round(x, 4) for x in two])
    assert np.max(np.abs(np.array(one) - np.array(two)) / np.array(one)) < 0.02


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_gpus(
    folder: Path, shards: Path, engine_file: Path, before: int, after: int
) -> None:
    """Stopped in the middle. What is loaded is checked bit for bit; losses then differ by bf16's rounding, which ten
    steps spread less than twenty do (the bound of the test above)."""
    straight = train(folder, shards, engine_file, before)
    name, half = f"from-{before}-to-{after}", STEPS // 2
    train(folder, shards, engine_file, before, name, ("--set", f"train.stop_at={half}"))
    losses = train(folder, shards, engine_file, after, name, ("--resume",))
    assert len(losses) == STEPS
    assert np.max(np.abs(np.array(losses) - np.array(straight))[half:] / np.array(straight)[half:]) < 0.02


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["ar", "pyramid"])
def test_five_seconds_of_video(folder: Path, shards: Path, engine_file: Path, sample_dir: Path, mode: str) -> None:
    train(folder, shards, engine_file, 1)
    model = folder / "model"
    if not model.exists():
        command("-m", "dualforce.cli", "export", str(folder / "run-1"), "--out", str(model))
    clip = sample_dir / "id02.mp4"
    sound = np.tile(read_audio(clip), 2)[: 5 * 16_000]
    with wave.open(str(folder / "five.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())
    sidecar = json.loads(clip.with_suffix(".json").read_text())
    sidecar["motion"]["values"] = sidecar["motion"]["values"][:1]
    (folder / "first.json").write_text(json.dumps(sidecar))
    picture = folder / "face.png"
    picture.write_bytes(png(read_video(clip, stop=1).frames[0]))
    out = folder / f"{mode}.mp4"
    command("-m", "dualforce.cli", "generate", str(model), "--image", str(picture), "--audio", str(folder / "five.wav"),
            "--out", str(out), "--motion", str(folder / "first.json"), "--mode", mode, "--steps", "8")  # fmt: skip
    assert len(read_video(out).frames) == 125
