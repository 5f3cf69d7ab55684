"""What is kept of an interrupted build, when it is used again, and what may not share it."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.clips import sidecar_json, textured, tone, write_sidecar
from helpers.set_files import set_bytes

from data_shards.reader import ShardSet
from dualforce.codecs.face_box import square_crop
from dualforce.codecs.media import read_image, write_video
from dualforce.codecs.registry import audio_encoder_in
from dualforce.preprocess import assemble, build, models, pool, work
from dualforce.preprocess.build import BuildOptions, build_shards
from dualforce.preprocess.content_id import NAMES, ContentHashes, content_id, surroundings
from dualforce.preprocess.errors import BuildError
from dualforce.preprocess.job import Job, Outcome
from dualforce.preprocess.lock import LOCK, locked
from dualforce.preprocess.models import Models
from dualforce.preprocess.quality import Limits
from dualforce.preprocess.thumbnail import thumbnail

OPTIONS = BuildOptions(size=64)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good clips and one without sound; not to be changed."""
    folder = tmp_path_factory.mktemp("clips")
    for seed, name in enumerate(("a", "b", "mute")):
        write_video(folder / f"{name}.mp4", textured(82, seed=seed), None if name == "mute" else tone(84))
        write_sidecar(folder / f"{name}.mp4", sidecar_json(82, identity=name))
    return folder


@pytest.fixture
def src(clips: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clips, tmp_path / "src"))


@pytest.fixture
def processed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], int]:
    """Gives the number of videos worked on since it was last asked. Workers are forked and see what a test changes."""
    log = tmp_path / "log"
    original = work.process_video

    def counted(job: Job, models: Models) -> Any:
        with open(log, "a") as file:
            file.write("x")
        return original(job, models)

    def take() -> int:
        count = len(log.read_text()) if log.exists() else 0
        log.unlink(missing_ok=True)
        return count

    monkeypatch.setattr(pool, "_context", lambda module: multiprocessing.get_context("fork"))
    monkeypatch.setattr(work, "process_video", counted)
    return take


def stopped(monkeypatch: pytest.MonkeyPatch, src: Path, out: Path, options: BuildOptions = OPTIONS) -> None:
    """A build that fails when all videos are done."""
    with monkeypatch.context() as patch:
        patch.setattr(build, "assemble", fail)
        with pytest.raises(RuntimeError):
            build_shards(src, out, options)


def fail(*_: object) -> None:
    raise RuntimeError


# Reuse


def test_finished_videos_are_not_done_again(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processed: Callable[[], int]
) -> None:
    build_shards(src, tmp_path / "whole", OPTIONS)
    assert processed() == 3 and not (tmp_path / "whole" / ".work").exists()
    out = tmp_path / "out"
    stopped(monkeypatch, src, out)
    assert processed() == 3 and sorted(path.name for path in out.iterdir()) == [".work"]
    report = build_shards(src, out, OPTIONS)
    assert processed() == 0 and report.earlier == 3
    assert set_bytes(out) == set_bytes(tmp_path / "whole")


def test_only_what_a_change_touches_is_done_again(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processed: Callable[[], int]
) -> None:
    out = tmp_path / "out"
    stopped(monkeypatch, src, out)
    processed()
    sidecar = json.loads((src / "a.json").read_text())
    write_sidecar(src / "a.mp4", {**sidecar, "identity": "another"})
    stopped(monkeypatch, src, out)
    assert processed() == 1
    stopped(monkeypatch, src, out, dataclasses.replace(OPTIONS, size=96))
    assert processed() == 3
    stopped(monkeypatch, src, out, dataclasses.replace(OPTIONS, limits=Limits(face_share=0.2)))
    assert processed() == 3
    # What is written into samples only when shards are: nothing is done again, and the names are the new ones.
    for suffix in (".mp4", ".json"):
        (src / f"b{suffix}").rename(src / f"renamed{suffix}")
    options = dataclasses.replace(OPTIONS, validation_share=0.5, licence="L", origin="O")
    build_shards(src, out, options)
    assert processed() == 0
    shards = ShardSet.open(out)
    samples = [shards.split(name).read(0) for name in ("train", "validation")]
    assert {sample.meta["source"] for sample in samples} == {"a.mp4", "renamed.mp4"}
    assert {sample.key.split("-")[0] for sample in samples} == {"a", "renamed"}
    assert {sample.identity for sample in samples} == {"another", "b"}
    assert all(sample.meta["licence"] == "CC0-1.0" and sample.meta["origin"] == "O" for sample in samples)
    assert [entry["source"] for entry in shards.manifest["rejected"]] == ["mute.mp4"]


def test_a_folder_of_work_serves_later_builds(src: Path, tmp_path: Path, processed: Callable[[], int]) -> None:
    kept = tmp_path / "kept"
    options = dataclasses.replace(OPTIONS, work=kept)
    for name in ("b.mp4", "b.json"):
        (src / name).rename(tmp_path / name)
    build_shards(src, tmp_path / "small", options)
    assert processed() == 2
    for name in ("b.mp4", "b.json"):
        (tmp_path / name).rename(src / name)
    assert build_shards(src, tmp_path / "large", options).earlier == 2
    assert processed() == 1
    build_shards(src, tmp_path / "whole", OPTIONS)
    assert set_bytes(tmp_path / "large") == set_bytes(tmp_path / "whole")
    assert not (tmp_path / "large" / ".work").exists()


def test_damaged_results_are_noticed(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processed: Callable[[], int]
) -> None:
    """A file that is cut short is done again; one that changed is named."""
    out = tmp_path / "out"
    stopped(monkeypatch, src, out)
    processed()
    first, second = sorted((out / ".work" / "results").glob("*/*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    stopped(monkeypatch, src, out)
    assert processed() == 1
    data = bytearray(second.read_bytes())
    data[-1] ^= 1
    second.write_bytes(data)
    with pytest.raises(BuildError, match=r"clip-w0000\.safetensors: not as it was written: remove ") as caught:
        build_shards(src, out, OPTIONS)
    shutil.rmtree(str(caught.value).partition("remove ")[2].partition(" and run")[0])
    assert build_shards(src, out, OPTIONS).used == 2
    assert processed() == 1


# What may go wrong


def test_one_build_at_a_time(src: Path, tmp_path: Path, processed: Callable[[], int]) -> None:
    out = tmp_path / "out"
    with (
        locked(out / ".work", out),
        pytest.raises(BuildError, match=rf"^{out}: another build is at work here: wait until it is done, or stop it$"),
    ):
        build_shards(src, out, OPTIONS)
    kept = tmp_path / "kept"
    with locked(kept, kept), pytest.raises(BuildError, match=f"^{kept}: another build"):
        build_shards(src, out, dataclasses.replace(OPTIONS, work=kept))
    assert processed() == 0
    build_shards(src, out, OPTIONS)


def test_a_lock_whose_file_was_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another build ends, and removes its folder, between our opening the file and locking it."""
    import fcntl

    original = fcntl.flock

    def late(file: Any, how: int) -> None:
        (tmp_path / LOCK).unlink()
        (tmp_path / LOCK).touch()
        original(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(BuildError, match="another build"), locked(tmp_path, tmp_path):
        pass


@pytest.mark.parametrize("where", ["worker", "shards"])
def test_a_full_disk_is_one_line_and_finished_videos_stay(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processed: Callable[[], int], where: str
) -> None:
    original = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if where == "worker" and path.suffix == ".safetensors" and len(list((out / ".work/results").iterdir())) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return original(path, data)

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        if where == "shards":
            patch.setattr("data_shards.shard.publish", no_room)
        with pytest.raises(BuildError) as caught:
            build_shards(src, out, OPTIONS)
    line = f"{out}: No space left on device: finished videos are kept in {out / '.work'}: make room and run the same"
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
    assert not list(out.glob("*.tar")) and not (out / "manifest.json").exists()
    assert processed() == 3
    assert build_shards(src, out, OPTIONS).earlier == (2 if where == "worker" else 3)
    assert processed() == (1 if where == "worker" else 0)


def test_a_video_that_kills_its_reader_is_rejected_and_the_rest_is_built(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processed: Callable[[], int]
) -> None:
    original = work.process_video

    def deadly(job: Job, models: Models) -> Any:
        if job.video.name == "a.mp4":
            os.kill(os.getpid(), signal.SIGKILL)
        return original(job, models)

    with monkeypatch.context() as patch:
        patch.setattr(work, "process_video", deadly)
        kept = dataclasses.replace(OPTIONS, work=tmp_path / "kept")
        report = build_shards(src, tmp_path / "out", kept)
    reasons = {entry["source"]: entry["reason"] for entry in report.manifest["rejected"]}
    assert reasons == {"a.mp4": "E_CRASH", "mute.mp4": "R_NOAUDIO"} and report.used == 1
    assert processed() == 2
    # The next build tries it again: the memory may have been short.
    assert build_shards(src, tmp_path / "again", kept).used == 2
    assert processed() == 1


@pytest.mark.parametrize("where", ["before", "manifest"])
def test_an_interrupted_move_leaves_no_set_and_is_made_good(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processed: Callable[[], int], where: str
) -> None:
    out = tmp_path / "out"
    original = os.replace

    def stop_at_manifest(old: Any, new: Any) -> None:
        if Path(new) == out / "manifest.json":
            raise RuntimeError
        original(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(
            *{"before": (assemble, "publish_set", fail), "manifest": (os, "replace", stop_at_manifest)}[where]
        )
        with pytest.raises(RuntimeError):
            build_shards(src, out, OPTIONS)
    assert bool(list(out.glob("*.tar"))) == (where == "manifest") and not (out / "manifest.json").exists()
    assert (out / ".work" / "set" / "manifest.json").exists()
    (out / "train-000007.tar").touch()  # of a killed build with other options, that had more shards
    build_shards(src, out, OPTIONS)
    assert processed() == 3
    build_shards(src, tmp_path / "whole", OPTIONS)
    assert set_bytes(out) == set_bytes(tmp_path / "whole")


def test_a_video_that_changes_meanwhile_is_not_taken_for_what_it_was(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processed: Callable[[], int]
) -> None:
    original = work.process_video

    def changing(job: Job, models: Models) -> Any:
        if job.video.name == "a.mp4":
            shutil.copy(src / "b.mp4", src / "a.mp4")
        return original(job, models)

    kept = dataclasses.replace(OPTIONS, work=tmp_path / "kept")
    with monkeypatch.context() as patch:
        patch.setattr(work, "process_video", changing)
        report = build_shards(src, tmp_path / "out", kept)
    assert report.used == 1
    entry = next(entry for entry in report.manifest["rejected"] if entry["source"] == "a.mp4")
    assert entry["reason"] == "E_INTERNAL" and "was changed or removed while the build was running" in entry["detail"]
    assert len(list((tmp_path / "kept" / "results").iterdir())) == 2


def test_a_passing_fault_is_tried_again(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processed: Callable[[], int]
) -> None:
    def out_of_memory(*_: object) -> None:
        raise MemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr("dualforce.preprocess.process.track_sidecar", out_of_memory)
        stopped(monkeypatch, src, tmp_path / "out")
    assert processed() == 3
    assert build_shards(src, tmp_path / "out", OPTIONS).used == 2
    assert processed() == 2  # the one without sound had not come that far


def test_the_largest_videos_come_first_and_workers_get_the_devices(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def order(tasks: list[work.Task], function: Any, devices: list[str], prepare: Any) -> list[Any]:
        seen.update(names=[task.job.source for task in tasks], calls=(prepare, function), devices=devices)
        raise RuntimeError

    monkeypatch.setattr(build, "run_tasks", order)
    monkeypatch.setattr(build, "kind_of_devices", lambda names: "cuda A")
    options = dataclasses.replace(OPTIONS, workers=3, devices=("cuda:0", "cuda:1"))
    with pytest.raises(RuntimeError):
        build_shards(src, tmp_path / "out", options)
    assert seen["names"] == sorted(seen["names"], key=lambda name: -(src / name).stat().st_size)
    assert seen["devices"] == ["cuda:0", "cuda:1", "cuda:0"] and seen["calls"] == (Models, work.perform)


def test_encoders_are_put_on_the_workers_device(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path | None, str]] = []

    def encoder(folder: Path | None, device: str = "cpu") -> Any:
        asked.append((folder, device))
        return audio_encoder_in(None)

    monkeypatch.setattr("dualforce.preprocess.models.audio_encoder_in", encoder)
    given = Job(video=src / "a.mp4", source="a", key="a", identity="a", sha256="0" * 64, bytes=1, size=64,
                limits=Limits(), sidecar=src / "a.json", landmarker=None, scratch=tmp_path,
                audio_encoder=tmp_path / "model")  # fmt: skip
    for name in ("results", "scratch"):
        (tmp_path / name).mkdir()
    result = work.perform(
        work.Task("id", given, tmp_path / "results", tmp_path / "scratch", work.times_of(given.video)), Models("cuda:1")
    )
    assert asked == [(tmp_path / "model", "cuda:1")] and len(result.samples) == 1 and result.kept


def test_networks_are_loaded_once_a_worker(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processed: Callable[[], int]
) -> None:
    """And anew after a fault that nobody foresaw: it may have been theirs."""
    log, load = tmp_path / "loads", models.audio_encoder_in

    def logged(folder: Path | None, device: str = "cpu") -> Any:
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        return load(folder, device)

    monkeypatch.setattr(models, "audio_encoder_in", logged)
    for name in "cd":
        (src / f"{name}.mp4").write_bytes((src / "a.mp4").read_bytes() + bytes(ord(name)))
        shutil.copy(src / "a.json", src / f"{name}.json")
    assert build_shards(src, tmp_path / "out", OPTIONS).used == 4
    assert processed() == 5 and len(log.read_text().split()) == 1

    class Broken:
        tag, channels = "broken-v1", 16

        def encode(self, pixels: Any) -> Any:
            raise RuntimeError("CUDA error")

    monkeypatch.setattr(models, "video_codec_in", lambda *_: Broken())
    log.unlink()
    with pytest.raises(BuildError, match="E_INTERNAL: RuntimeError: CUDA error"):
        build_shards(src, tmp_path / "broken", OPTIONS)
    assert len(log.read_text().split()) == 4


def test_the_thumbnail_is_the_first_samples_first_crop(src: Path, tmp_path: Path) -> None:
    boxes = [[20.0, 30.0, 110.0, 120.0]] * 81
    meta = {"first_pixel_frame": 40, "crop": {"boxes": boxes}}
    (tmp_path / "clip.json").write_text(json.dumps({"meta": meta}))
    data = thumbnail(job(tmp_path, video=src / "a.mp4"), Outcome("a", (tmp_path / "clip",)))
    assert data is not None
    (tmp_path / "picture.jpg").write_bytes(data)
    found = read_image(tmp_path / "picture.jpg").astype(float)
    frames = textured(82, seed=0)
    wanted = square_crop(frames[40], np.array([65.0, 75.0, 90.0]), 128).astype(float)
    other = square_crop(frames[0], np.array([65.0, 75.0, 90.0]), 128).astype(float)
    assert np.abs(found - wanted).mean() < 8 < 20 < np.abs(found - other).mean()


# Content ids


def job(folder: Path, **changes: Any) -> Job:
    (folder / "model").mkdir(exist_ok=True)
    for name in ("v.mp4", "v.json", "model/config.json", "face.task"):
        (folder / name).write_text(name)
    fields = {
        "video": folder / "v.mp4", "source": "v.mp4", "key": "v", "identity": "i", "sha256": "0" * 64, "bytes": 5,
        "size": 64, "limits": Limits(), "sidecar": folder / "v.json", "landmarker": folder / "face.task",
        "scratch": folder, "audio_encoder": folder / "model",
    }  # fmt: skip
    return Job(**{**fields, **changes})


AROUND = {"extractors": {"video": {"tag": "t"}}, "device": "cpu"}


def test_every_field_of_a_job_counts_unless_it_is_a_name(tmp_path: Path) -> None:
    """Also fields that are still to come: a value of another type than these is refused, not left out."""
    (tmp_path / "other").write_text("other")
    first = content_id(job(tmp_path), AROUND, ContentHashes())
    others: dict[type, Any] = {int: 7, str: "other", type(None): "other", Limits: Limits(seconds=9)}
    for field in dataclasses.fields(Job):
        value = getattr(job(tmp_path), field.name)
        other = tmp_path / "other" if isinstance(value, Path) else others[type(value)]
        changed = content_id(job(tmp_path, **{field.name: other}), AROUND, ContentHashes())
        assert (changed == first) == (field.name in NAMES), field.name
    for limit in dataclasses.fields(Limits):
        limits = dataclasses.replace(Limits(), **{limit.name: getattr(Limits(), limit.name) + 1})
        assert content_id(job(tmp_path, limits=limits), AROUND, ContentHashes()) != first, limit.name
    with pytest.raises(TypeError, match="bytes"):
        content_id(job(tmp_path, size=b"7"), AROUND, ContentHashes())


def test_contents_of_files_count_and_their_places_do_not(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    given = job(tmp_path / "one")
    first = content_id(given, AROUND, ContentHashes())
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert content_id(job(tmp_path / "two"), AROUND, ContentHashes()) == first
    for name in ("v.json", "face.task", "model/config.json"):
        (tmp_path / "one" / name).write_text("changed")
        assert content_id(given, AROUND, ContentHashes()) != first, name
        (tmp_path / "one" / name).write_text(name)
    (tmp_path / "one" / "model" / "more.bin").touch()
    assert content_id(given, AROUND, ContentHashes()) != first


def test_surroundings_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tags of extractors, kind of device, versions of libraries and the code of the stages."""
    first = surroundings({"video": {"tag": "t"}}, "cpu")
    ids = {content_id(job(tmp_path), around, ContentHashes()) for around in (
        first, surroundings({"video": {"tag": "u"}}, "cpu"), surroundings({"video": {"tag": "t"}}, "cuda X"),
        {**first, "code": "other"}, {**first, "libraries": {**first["libraries"], "av": "0"}},
    )}  # fmt: skip
    assert len(ids) == 5
    assert {"av", "numpy", "torch"} <= first["libraries"].keys()
