"""Building from clips with sidecars: every kind of bad file is rejected with its reason, the rest is built, and the
result depends neither on the workers nor on the order of the work."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.clips import sidecar_json, textured, tone, write_sidecar
from helpers.set_files import set_bytes
from hypothesis import given
from hypothesis import strategies as st

from data_shards.reader import ShardSet
from data_shards.schema import ShardError
from dualforce.codecs.media import write_video
from dualforce.codecs.protocols import CodecError
from dualforce.config import ConfigError
from dualforce.preprocess.build import BuildError, BuildOptions, BuildReport, build_shards
from dualforce.preprocess.files import find_videos, key_of
from dualforce.preprocess.identities import IdentityError, read_identities
from dualforce.preprocess.split import split_identities

ONE = BuildOptions(size=64)


def clip(folder: Path, name: str, *, frames: int = 85, seed: int = 0, amplitude: float | None = 0.3) -> Path:
    path = folder / f"{name}.mp4"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, textured(frames, seed=seed), None if amplitude is None else tone(frames + 2, amplitude))
    write_sidecar(path, sidecar_json(frames, identity=f"person {name}"))
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good clips a, b (two windows) and sub/c, and one of each kind of bad one."""
    folder = tmp_path_factory.mktemp("mixed")
    clip(folder, "a", seed=1)
    clip(folder, "b", seed=2, frames=170)
    clip(folder, "sub/c", seed=3)
    shutil.copy(folder / "a.mp4", folder / "copy of a.mp4")
    write_sidecar(folder / "copy of a.mp4", sidecar_json(85))
    clip(folder, "mute", amplitude=None)
    clip(folder, "silent", amplitude=0.0)
    clip(folder, "short", frames=60)
    small = clip(folder, "small", seed=4)
    write_sidecar(small, sidecar_json(85, face_boxes=[[50, 50, 60, 62]] * 85))
    wrong = clip(folder, "rows", seed=5)
    write_sidecar(wrong, sidecar_json(84))
    broken = clip(folder, "sidecar", seed=6)
    write_sidecar(broken, sidecar_json(85, fps=30))
    (folder / "text.mp4").write_text("not a video")
    write_sidecar(folder / "text.mp4", sidecar_json(85))
    (folder / "empty.mkv").touch()
    write_sidecar(folder / "empty.mkv", sidecar_json(85))
    (folder / ".hidden.mp4").write_text("ignored")
    (folder / "notes.txt").write_text("ignored")
    return folder


@pytest.fixture(scope="module")
def built(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildReport, Path]:
    out = tmp_path_factory.mktemp("built") / "out"
    return build_shards(mixed, out, ONE), out


def test_good_files_are_built_and_bad_ones_named(mixed: Path, built: tuple[BuildReport, Path]) -> None:
    report, out = built
    assert {(e["source"], e["reason"]) for e in report.manifest["rejected"]} == {
        ("copy of a.mp4", "R_DUPLICATE"),
        ("mute.mp4", "R_NOAUDIO"),
        ("silent.mp4", "R_SILENT"),
        ("short.mp4", "R_SHORT"),
        ("small.mp4", "R_SMALLFACE"),
        ("rows.mp4", "E_SIDECAR"),
        ("sidecar.mp4", "E_SIDECAR"),
        ("text.mp4", "E_DECODE"),
        ("empty.mkv", "E_DECODE"),
    }
    details = {e["source"]: e["detail"] for e in report.manifest["rejected"]}
    assert "84 rows: expected 85" in details["rows.mp4"] and "fps: 30" in details["sidecar.mp4"]
    assert all("\n" not in detail and str(mixed) not in detail for detail in details.values())
    shards = ShardSet.open(out)
    keys = [key for split in ("train", "validation") for key in shards.split(split).keys]
    assert len(keys) == 4 and report.used == 3
    assert sorted(key.split("-")[0] for key in keys) == ["a", "b", "b", "c"]
    assert not list(out.glob(".*")) and not (out / ".work").exists()


def test_the_result_does_not_depend_on_the_workers(
    mixed: Path, built: tuple[BuildReport, Path], tmp_path: Path
) -> None:
    one, out = built
    two = build_shards(mixed, tmp_path / "two", BuildOptions(size=64, workers=3))
    assert set_bytes(out) == set_bytes(tmp_path / "two")
    assert one.manifest == two.manifest


def test_motion_is_the_sidecars(built: tuple[BuildReport, Path]) -> None:
    report, out = built
    assert report.manifest["extractors"]["motion"] == {"tag": "test-v1", "width": 2, "names": ["yaw", "mouth"]}
    shards = ShardSet.open(out)
    samples = [shards.split(s).read(i) for s in ("train", "validation") for i in range(len(shards.split(s)))]
    second = next(sample for sample in samples if sample.meta["window"] == 1)
    assert torch.allclose(second.struct[1, :, 0], torch.tensor([8.2, 8.3, 8.4, 8.5]))
    assert {sample.identity for sample in samples} == {"person a", "person b", "person sub/c"}
    assert {sample.meta["licence"] for sample in samples} == {"CC0-1.0"}


def test_bundled_sample(sample_dir: Path, tmp_path: Path) -> None:
    for path in sorted(sample_dir.glob("id0[0-2].*")):
        shutil.copy(path, tmp_path / path.name)
    report = build_shards(tmp_path, tmp_path / "out", BuildOptions())
    assert report.used == 3 and report.manifest["rejected"] == []
    shards = ShardSet.open(tmp_path / "out")
    truth = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    for split in ("train", "validation"):
        for index in range(len(shards.split(split))):
            sample = shards.split(split).read(index)
            values = np.array(truth[Path(sample.meta["source"]).stem]["motion"]["values"])
            assert np.allclose(sample.struct[3].numpy(), values[9:13], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuildOptions(size=100), "--size 100: expected a multiple of 16"),
        (BuildOptions(size=2064), "--size 2064: expected at most 2048"),
        (BuildOptions(workers=0), "--workers 0: expected at least 1"),
        (BuildOptions(validation_share=1.0), "--validation-share 1.0"),
    ],
)
def test_bad_options(mixed: Path, tmp_path: Path, options: BuildOptions, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        build_shards(mixed, tmp_path / "out", options)


def test_folders_that_give_nothing(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="expected a folder of videos"):
        build_shards(tmp_path / "none", tmp_path / "out", ONE)
    (tmp_path / "bare").mkdir()
    with pytest.raises(BuildError, match="no video file"):
        build_shards(tmp_path / "bare", tmp_path / "out", ONE)
    clip(tmp_path / "mute", "m", amplitude=None)
    with pytest.raises(BuildError, match=r"no video gave a sample: m\.mp4: R_NOAUDIO") as caught:
        build_shards(tmp_path / "mute", tmp_path / "out", ONE)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".work", "report.html", "report.json"]


def test_motion_without_source_or_from_two(tmp_path: Path) -> None:
    first = clip(tmp_path / "v", "a", seed=1)
    second = clip(tmp_path / "v", "b", seed=2)
    second.with_suffix(".json").unlink()
    with pytest.raises(BuildError, match=r"'mediapipe-face-landmarker-v1'.*'test-v1'"):
        build_shards(tmp_path / "v", tmp_path / "out", ONE)
    write_sidecar(second, sidecar_json(85, tag="other-v2"))
    with pytest.raises(BuildError, match=r"'other-v2'.*'test-v1'"):
        build_shards(tmp_path / "v", tmp_path / "out", ONE)
    first.with_suffix(".json").unlink()
    second.with_suffix(".json").unlink()
    with pytest.raises(BuildError, match="--face-landmarker FILE"):
        build_shards(tmp_path / "v", tmp_path / "out", ONE)
    with pytest.raises(CodecError, match="no such file"):
        build_shards(tmp_path / "v", tmp_path / "out", BuildOptions(face_landmarker=tmp_path / "none.task"))


@pytest.mark.parametrize("option", ["face_landmarker", "motion_extractor"])
def test_models_of_motion_beside_sidecars_are_refused(tmp_path: Path, option: str) -> None:
    """Nothing would be done with them: not even whether the file is there would be told."""
    clip(tmp_path / "v", "a", seed=1)
    name = f"--{option.replace('_', '-')}"
    with pytest.raises(BuildError, match=rf"^{name} {tmp_path}/x: .* of tag 'test-v1': expected one source of motion$"):
        build_shards(tmp_path / "v", tmp_path / "out", replace(ONE, **{option: tmp_path / "x"}))


def test_a_folder_with_shards_is_left_alone(mixed: Path, built: tuple[BuildReport, Path]) -> None:
    """The same build again has nothing to do; another one is refused."""
    report, out = built
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    again = build_shards(mixed, out, ONE)
    assert again.manifest == report.manifest and (again.used, again.earlier) == (report.used, again.videos)
    with pytest.raises(ShardError, match="a shard set exists here, of other videos or options"):
        build_shards(mixed, out, BuildOptions(size=64, validation_share=0.4))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@given(st.sets(st.text(min_size=1), min_size=1, max_size=40), st.floats(0.01, 0.99))
def test_split_of_identities(names: set[str], share: float) -> None:
    names = {name for name in names if name.isprintable()} or {"x"}
    split = split_identities(names, share)
    held_out = [name for name, where in split.items() if where == "validation"]
    assert set(split) == names
    if len(names) == 1:
        assert not held_out
    else:
        assert 1 <= len(held_out) < len(names)
        assert abs(len(held_out) - share * len(names)) <= 1
    assert split == split_identities(sorted(names, reverse=True), share)


def test_names_of_files(tmp_path: Path) -> None:
    for name in ("b.MP4", "a.webm", "x.txt", "-rf.mp4", "new\nline.mov", "ü.mkv"):
        (tmp_path / name).touch()
    assert [p.name for p in find_videos(tmp_path)] == ["-rf.mp4", "a.webm", "b.MP4", "new\nline.mov", "ü.mkv"]
    assert key_of(Path("new\nline ü!.mov"), "ab" * 32) == "new-line-abababababab"
    assert key_of(Path("ü.mkv"), "ab" * 32) == "video-abababababab"
    assert len(key_of(Path("n" * 250 + ".mp4"), "ab" * 32)) <= 60


def test_features_of_a_speech_encoder(tmp_path: Path, whisper_folder: Path) -> None:
    """In the shards with width and a tag of its own, two workers each with their own copy of the model."""
    pytest.importorskip("transformers")
    for name in ("a", "b"):
        clip(tmp_path / "clips", name)
    options = BuildOptions(size=64, workers=2, audio_encoder=whisper_folder, validation_share=0.5)
    manifest = build_shards(tmp_path / "clips", tmp_path / "shards", options).manifest
    audio = manifest["extractors"]["audio"]
    assert audio["width"] == 384 and audio["hz"] == 50 and audio["tag"].startswith("whisper-384-")
    sample = ShardSet.open(tmp_path / "shards").split("train").read(0)
    assert sample.audio.shape == (21, 8, 384) and sample.audio.dtype == torch.float16
    assert sample.meta["tags"]["audio"] == audio["tag"]


def test_a_folder_without_speech_encoder_is_one_line(mixed: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CodecError, match="model_type = None: expected hubert or whisper"):
        build_shards(mixed, tmp_path / "out", BuildOptions(size=64, audio_encoder=tmp_path))
    assert not list((tmp_path / "out").glob("*.tar"))


def test_identities_of_a_file_keep_videos_of_one_person_in_one_split(tmp_path: Path) -> None:
    for number in range(6):
        clip(tmp_path / "clips", f"sub/v{number}", seed=number)
    people = {f"sub/v{number}": f"person {number % 2}" for number in range(6)} | {"sub/never": "nobody"}
    (tmp_path / "who.json").write_text(json.dumps(people))
    options = BuildOptions(size=64, identities=tmp_path / "who.json", validation_share=0.5)
    manifest = build_shards(tmp_path / "clips", tmp_path / "shards", options).manifest
    splits = [manifest["splits"][name] for name in ("train", "validation")]
    assert sorted(split["identities"] for split in splits) == [["person 0"], ["person 1"]]
    assert [split["samples"] for split in splits] == [3, 3]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[", "not JSON, line 1"),
        ("[]", "expected a JSON object, found list"),
        ('{"a": "x", "b": "y", "sub/c": "y", "a": "z"}', "key a: given twice: expected once"),
        ('{"a": "x"}', "'b' and 1 more are missing: expected an entry for each video"),
        ('{"a": "x", "b": 3, "sub/c": "y"}', "'b': 3: expected a name of the person"),
    ],
)
def test_unusable_identities_are_one_line(tmp_path: Path, content: str, named: str) -> None:
    (tmp_path / "who.json").write_text(content)
    with pytest.raises((ConfigError, IdentityError), match=named) as caught:
        read_identities(tmp_path / "who.json", ["a.mp4", "b.mov", "sub/c.mkv"])
    assert "\n" not in str(caught.value) and "who.json" in str(caught.value)
