"""The command line from end to end on a small random model, and bad input as one line with exit code 2."""

from __future__ import annotations

import json
import re
import shutil
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.checkpoint_folder import write_checkpoint
from helpers.model_folder import MOTION_NAMES, SIZE, run_config, write_model_folder
from helpers.random_model import random_model
from helpers.tiny_umt5 import write_umt5
from helpers.wan_vae import write_wan_vae
from safetensors.torch import save_file

from dualforce import cli
from dualforce.codecs.audio_logmel import WIDTH as AUDIO_WIDTH
from dualforce.codecs.media import probe, read_image, read_video, write_video
from dualforce.codecs.text_umt5 import Umt5Text, padded
from dualforce.codecs.video_wan import WanVideoCodec
from dualforce.train.checkpoint import SavedState
from dualforce.types import SAMPLE_RATE
from dualforce.weights.load import load_model

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call `dualforce ARGS`; returns the exit code and what it wrote to stderr."""

    def call(*args: Any) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["dualforce", *map(str, args)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0), capsys.readouterr().err

    return call


def write_picture(path: Path, height: int, width: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    path.write_bytes(b"P6 %d %d 255\n" % (width, height) + pixels.tobytes())


def write_sound(path: Path, seconds: float) -> None:
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    samples = (0.3 * np.sin(2 * np.pi * 220 * time) * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(samples.tobytes())


def write_motion(path: Path, rows: int, tag: str = "rendered-head-v1", names: list[str] | None = None) -> Path:
    names = names or MOTION_NAMES
    values = np.random.default_rng(1).normal(size=(rows, len(names))).round(4).tolist()
    motion = {"tag": tag, "names": names, "values": values}
    path.write_text(json.dumps({"format": "dualforce-sidecar", "version": 1, "motion": motion}))
    return path


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, a picture, a second of sound and a motion of frame 0."""
    folder = tmp_path_factory.mktemp("shop")
    write_model_folder(folder / "model")
    write_picture(folder / "face.ppm", SIZE, SIZE)
    write_picture(folder / "wide.ppm", 40, 50)
    write_picture(folder / "large.ppm", 48, 48)
    write_sound(folder / "speech.wav", 1.0)
    write_motion(folder / "motion.json", 1)
    return folder


def arguments(shop: Path, out: Path, **changes: Any) -> list[Any]:
    """A good command line with some options changed (None leaves one out)."""
    options = {
        "image": shop / "face.ppm", "audio": shop / "speech.wav", "motion": shop / "motion.json", "out": out,
        "steps": 2, "device": "cpu",
    } | {name.replace("_", "-"): value for name, value in changes.items()}  # fmt: skip
    given = [(f"--{name}", value) for name, value in options.items() if value is not None]
    return ["generate", shop / "model", *(part for pair in given for part in pair)]


def test_one_second_of_sound_gives_25_pictures_with_sound(shop: Path, tmp_path: Path, run: Run) -> None:
    code, err = run(*arguments(shop, tmp_path / "new" / "v.mp4"))
    assert code == 0, err
    info, video = probe(tmp_path / "new" / "v.mp4"), read_video(tmp_path / "new" / "v.mp4")
    assert (info.width, info.height, info.rate, info.codec) == (SIZE, SIZE, 25.0, "h264")
    assert video.frames.shape == (25, SIZE, SIZE, 3)
    assert video.sound is not None
    heard = video.sound.wave[1600:14400]
    pitch = np.abs(np.fft.rfft(heard)).argmax() * SAMPLE_RATE / len(heard)
    assert abs(pitch - 220) < 2 and 0.15 < heard.std() < 0.27  # the driving tone, at its level
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["v.mp4"]


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "pyramid", "seconds": 0.4},
        {"mode": "pyramid", "lag": 2, "horizon": 2, "window": 2, "seconds": 0.4},
        {"cfg_audio": 2.0, "seconds": 0.4},
        {"window": 1, "seconds": 0.04},
        {"dtype": "bfloat16", "seconds": 0.4},
    ],
    ids=["pyramid", "pyramid-window", "guidance", "one-picture", "bf16"],
)
def test_modes_and_seconds(shop: Path, tmp_path: Path, run: Run, changes: dict[str, Any]) -> None:
    code, err = run(*arguments(shop, tmp_path / "v.mp4", **changes))
    assert code == 0, err
    assert len(read_video(tmp_path / "v.mp4").frames) == round(changes["seconds"] * 25)


def test_same_seed_same_video_other_seed_or_motion_another(shop: Path, tmp_path: Path, run: Run) -> None:
    driving = write_motion(tmp_path / "drive.json", 40)
    made = {}
    variants = {
        "a": {},
        "b": {},
        "seed": {"seed": 1},
        "driven": {"motion": driving},
        "large": {"image": shop / "large.ppm"},
    }
    for name, changes in variants.items():
        code, err = run(*arguments(shop, tmp_path / f"{name}.mp4", seconds=0.4, **changes))
        assert code == 0, err
        made[name] = read_video(tmp_path / f"{name}.mp4").frames
    assert np.array_equal(made["a"], made["b"])
    assert all(not np.array_equal(made["a"], made[name]) for name in ("seed", "driven", "large"))


def test_text_embedding_is_read(shop: Path, tmp_path: Path, run: Run) -> None:
    source = torch.Generator().manual_seed(0)
    save_file({"text": torch.randn(4, 64, generator=source)}, tmp_path / "text.safetensors")
    videos = []
    for name, changes in {
        "plain": {}, "text": {"text_embedding": tmp_path / "text.safetensors"},
        "more": {"text_embedding": tmp_path / "text.safetensors", "cfg_text": 3.0, "cfg_audio": 2.0},
    }.items():  # fmt: skip
        code, err = run(*arguments(shop, tmp_path / f"{name}.mp4", seconds=0.4, **changes))
        assert code == 0, err
        videos.append(read_video(tmp_path / f"{name}.mp4").frames)
    assert not np.array_equal(videos[0], videos[1]) and not np.array_equal(videos[1], videos[2])


@pytest.fixture(scope="module")
def wan_shop(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a model that was trained on latents of a Wan VAE, and VAEs: `vae`, its own, and `other`."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("wan") / "shop"
    shutil.copytree(shop, folder, ignore=shutil.ignore_patterns("model"))
    write_wan_vae(folder / "vae")
    write_wan_vae(folder / "other", seed=1)
    extractors = run_config(random_model(len(MOTION_NAMES), AUDIO_WIDTH, seed=3))["extractors"]
    extractors["video"]["tag"] = WanVideoCodec(folder / "vae").tag
    write_model_folder(folder / "model", extractors=extractors)
    return folder


def test_a_model_of_wan_latents_shows_its_picture_first(wan_shop: Path, tmp_path: Path, run: Run) -> None:
    code, err = run(*arguments(wan_shop, tmp_path / "v.mp4", seconds=0.4, video_codec=wan_shop / "vae"))
    assert code == 0, err
    made, codec = read_video(tmp_path / "v.mp4").frames, WanVideoCodec(wan_shop / "vae")
    assert made.shape == (10, SIZE, SIZE, 3)
    through = codec.decode(codec.encode_image(read_image(wan_shop / "face.ppm"))[None])[0].astype(float)
    likeness = [np.corrcoef(picture.ravel(), through.ravel())[0, 1] for picture in made.astype(float)]
    assert likeness[0] > 0.6 > 2 * likeness[-1], likeness  # H.264 between them; later ones start from noise


WRONG_CODEC = {
    "none": (None, r"video codec 'wan2\.1-.*': needs --video-codec DIR"),
    "other": ("other", r"video codec in .*other: is 'wan2\.1-.*': expected 'wan2\.1-"),
    "gone": ("gone", r"config\.json: no such file"),
}


@pytest.mark.parametrize("case", WRONG_CODEC)
def test_another_video_codec_is_one_line(wan_shop: Path, tmp_path: Path, run: Run, case: str) -> None:
    name, message = WRONG_CODEC[case]
    code, err = run(*arguments(wan_shop, tmp_path / "v.mp4", video_codec=name and wan_shop / name))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and re.search(message, errors[0]), err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def text_shop(shop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a model that was trained with texts of the umT5 in `umt5`."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("text") / "shop"
    shutil.copytree(shop, folder, ignore=shutil.ignore_patterns("model"))
    write_umt5(folder / "umt5")
    write_umt5(folder / "other", seed=1)
    extractors = run_config(random_model(len(MOTION_NAMES), AUDIO_WIDTH, seed=3))["extractors"]
    write_model_folder(
        folder / "model", extractors=extractors | {"text": {"tag": Umt5Text(folder / "umt5").tag, "width": 64}}
    )
    return folder


def test_words_are_what_their_embedding_is(text_shop: Path, tmp_path: Path, run: Run) -> None:
    words = "a man laughs"
    embedding = padded(Umt5Text(text_shop / "umt5").encode(words)).half()
    save_file({"text": embedding}, tmp_path / "text.safetensors")
    videos = {}
    for name, changes in {
        "plain": {}, "file": {"text_embedding": tmp_path / "text.safetensors"},
        "words": {"text": f" {words}\n", "text_encoder": text_shop / "umt5"},
        "guided": {"text": words, "text_encoder": text_shop / "umt5", "cfg_text": 50.0},
    }.items():  # fmt: skip
        code, err = run(*arguments(text_shop, tmp_path / f"{name}.mp4", seconds=0.4, **changes))
        assert code == 0, err
        videos[name] = read_video(tmp_path / f"{name}.mp4").frames
    assert np.array_equal(videos["file"], videos["words"])
    assert not np.array_equal(videos["plain"], videos["words"])
    assert not np.array_equal(videos["guided"], videos["words"])


BAD_TEXT: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "no-encoder": (lambda shop: {"text": "a"}, r"--text: needs --text-encoder DIR, the folder of the model 'umt5-64-"),
    "other": (lambda shop: {"text": "a", "text_encoder": shop / "other"}, r"other: is 'umt5-.*': expected 'umt5-64-"),
    "blank": (lambda shop: {"text": " ", "text_encoder": shop / "umt5"}, r"--text ' ': expected words"),
    "no-text": (lambda shop: {"text_encoder": shop / "umt5"}, r"umt5: not used: expected --text TEXT with it"),
    "both": (
        lambda shop: {"text": "a", "text_encoder": shop / "umt5", "text_embedding": shop / "x.safetensors"},
        r"--text and --text-embedding: expected one of them",
    ),
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_bad_texts_are_one_line(text_shop: Path, tmp_path: Path, run: Run, case: str) -> None:
    change, message = BAD_TEXT[case]
    code, err = run(*arguments(text_shop, tmp_path / "v.mp4", **change(text_shop)))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and re.search(message, errors[0]), err
    assert not list(tmp_path.iterdir())


def bad_motion_tag(shop: Path, work: Path) -> dict[str, Any]:
    return {"motion": write_motion(work / "m.json", 1, tag="other-v1")}


def bad_motion_names(shop: Path, work: Path) -> dict[str, Any]:
    return {"motion": write_motion(work / "m.json", 1, names=["a", "b", "c", "d"])}


def short_motion(shop: Path, work: Path) -> dict[str, Any]:
    return {"motion": write_motion(work / "m.json", 24)}


def narrow_text(shop: Path, work: Path) -> dict[str, Any]:
    save_file({"text": torch.zeros(2, 3)}, work / "t.safetensors")
    return {"text_embedding": work / "t.safetensors"}


def text_of_another_name(shop: Path, work: Path) -> dict[str, Any]:
    save_file({"words": torch.zeros(2, 64)}, work / "t.safetensors")
    return {"text_embedding": work / "t.safetensors"}


def silent_video(shop: Path, work: Path) -> dict[str, Any]:
    write_video(work / "s.mp4", iter(np.zeros((3, 32, 32, 3), np.uint8)), None)
    return {"audio": work / "s.mp4"}


def short_sound(shop: Path, work: Path) -> dict[str, Any]:
    write_sound(work / "s.wav", 0.03)
    return {"audio": work / "s.wav"}


def broken_picture(shop: Path, work: Path) -> dict[str, Any]:
    (work / "b.png").write_bytes(b"no picture")
    return {"image": work / "b.png"}


def absent(option: str, name: str) -> Callable[[Path, Path], dict[str, Any]]:
    return lambda shop, work: {option: work / name}


def option(**changes: Any) -> Callable[[Path, Path], dict[str, Any]]:
    return lambda shop, work: changes


BAD: dict[str, tuple[Callable[[Path, Path], dict[str, Any]], str]] = {
    "no-image": (absent("image", "x.png"), "x.png: cannot decode: No such file"),
    "broken-image": (broken_picture, "b.png: cannot decode"),
    "wide-image": (
        lambda shop, work: {"image": shop / "wide.ppm"},
        "50 x 40 pixels: expected a square picture, or --face",
    ),
    "no-audio": (absent("audio", "x.wav"), "x.wav: cannot decode: No such file"),
    "audio-without-sound": (silent_video, "s.mp4: no sound"),
    "short-audio": (short_sound, "0.030 s of sound: expected at least 0.04 s"),
    "seconds": (option(seconds=1.5), "--seconds 1.5: expected 0.04 to 1, the length of"),
    "endless": (option(seconds=float("inf")), "--seconds inf: expected 0.04 to 1"),
    "no-number": (option(seconds=float("nan")), "--seconds nan: expected 0.04 to 1"),
    "cfg-audio": (option(cfg_audio=float("nan")), "--cfg-audio nan: expected a finite number"),
    "no-landmarker": (absent("face_landmarker", "x.task"), "x.task: no such file"),
    "no-seconds": (option(seconds=0.0), "--seconds 0.0: expected 0.04 to 1"),
    "motion-tag": (bad_motion_tag, "motion.tag = 'other-v1': expected 'rendered-head-v1'"),
    "motion-names": (bad_motion_names, "motion.names = ['a', 'b', 'c', 'd']: expected ['pitch', 'yaw',"),
    "motion-rows": (short_motion, "24 rows: expected 1 (motion of frame 0), or at least 25"),
    "no-motion": (option(motion=None), "motion 'rendered-head-v1': no encoder computes it from pictures"),
    "absent-motion": (absent("motion", "x.json"), "x.json: no such file"),
    "text-width": (narrow_text, "text of shape [2, 3]: expected finite [E,64]"),
    "text-name": (text_of_another_name, "tensors ['words']: expected one called 'text'"),
    "absent-text": (absent("text_embedding", "x.safetensors"), "--text-embedding"),
    "cfg-text": (option(cfg_text=2.0), "--cfg-text 2.0: needs --text TEXT or --text-embedding FILE"),
    "steps": (option(steps=0), "--steps 0: expected at least 1"),
    "window": (option(window=0), "--window 0: expected at least 1"),
    "device": (option(device="abacus"), "--device abacus: expected auto, cpu, cuda"),
    "text-untrained": (option(text="a man", text_encoder="x"), "--text: this model was trained without texts"),
    "video-codec": (absent("video_codec", "vae"), "vae: not used: expected none, as the video codec is 'dct"),
    "audio-encoder": (absent("audio_encoder", "x"), "x: not used: expected none, as the audio encoder is 'logmel-80"),
    "motion-extractor": (absent("motion_extractor", "x"), "x: not used: expected none, as --motion gives the motion"),
    "out": (lambda shop, work: {"out": work / "v.avi"}, "v.avi: expected a name that ends in .mp4"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(shop: Path, tmp_path: Path, run: Run, case: str) -> None:
    change, message = BAD[case]
    (tmp_path / "work").mkdir()
    changes = {"out": tmp_path / "out.mp4"} | change(shop, tmp_path / "work")
    before = set(tmp_path.rglob("*"))
    code, err = run(*arguments(shop, changes.pop("out"), **changes))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and message in errors[0], err
    assert "Traceback" not in err and set(tmp_path.rglob("*")) == before


def test_model_folder_that_is_none(shop: Path, tmp_path: Path, run: Run) -> None:
    args = arguments(shop, tmp_path / "v.mp4")
    args[1] = tmp_path
    code, err = run(*args)
    assert (
        code == 2 and err.splitlines()[-1] == f"error: {tmp_path / 'config.json'}: no such file: expected a JSON object"
    )


def test_export_of_a_run(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()} | {"heads.tau": torch.zeros(())}
    asked: list[Any] = []

    def read(folder: Path, step: int | None = None) -> dict[str, torch.Tensor]:
        asked.append((folder, step))
        return state

    monkeypatch.setattr("dualforce.train.checkpoint.read_fp32_state", read)
    written = run_config(model)
    beside = {key: value for key, value in written.items() if key != "run"}
    write_checkpoint(tmp_path / "run", SavedState(7, 1, 1, 0, written["run"], {}, {}, "x", "y", beside))
    (tmp_path / "run" / "config.json").write_text("of a later step, with other shards")
    code, err = run("export", tmp_path / "run", "--out", tmp_path / "model", "--step", 7)
    assert code == 0, err
    assert asked == [(tmp_path / "run", 7)]
    loaded, config = load_model(tmp_path / "model", torch.device("cpu"), torch.float32)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert config["noise"] == {"shift_video": 3.0, "sample_shift_struct": 0.5}
    code, err = run("export", tmp_path / "run", "--out", tmp_path / "model")
    assert code == 2 and "model: exists and is not empty" in err.splitlines()[-1]


def test_export_without_a_checkpoint(tmp_path: Path, run: Run) -> None:
    code, err = run("export", tmp_path, "--out", tmp_path / "model")
    assert code == 2 and "LATEST: no such file; expected a run with a checkpoint" in err.splitlines()[-1]
    assert not (tmp_path / "model").exists()
