"""The work of a build that a later start need not repeat: what became of each video, kept under its content id.

A result is a folder, RESULTS/ID, with the files of its samples, a thumbnail and `result.json`, which lists sizes and
checksums. It is made elsewhere, synced and renamed: a result is whole or absent, whatever ended the process.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_shards.files import publish, sync_folder
from data_shards.manifest import MANIFEST_NAME
from data_shards.schema import ClipSample
from data_shards.shard import own_files, remove_own_files
from dualforce.codecs.media import MediaError, duration
from dualforce.preprocess.errors import BuildError, is_disk_full
from dualforce.preprocess.job import Job, Outcome, rejection
from dualforce.preprocess.lock import locked
from dualforce.preprocess.models import Models
from dualforce.preprocess.process import process_video
from dualforce.preprocess.reasons import Reason
from dualforce.preprocess.sample_file import load_sample
from dualforce.preprocess.thumbnail import thumbnail

FOLDER = ".work"  # in the folder of the shards
RESULTS = "results"
TEXTS = "texts"
RECORD = "result.json"
THUMBNAIL = "thumbnail.jpg"
KEY = "clip"  # starts the keys of kept samples: their names are given when shards are written
# May pass when it is tried again: memory ran out, a driver failed.
PASSING = frozenset((Reason.E_INTERNAL, Reason.E_CRASH))


@dataclass(frozen=True)
class Work:
    """Folders of a build: `results` of finished videos, `texts` that were embedded, `scratch` of this process,
    `staging` for the shards."""

    results: Path
    texts: Path
    scratch: Path
    staging: Path


@dataclass(frozen=True)
class Task:
    """A job, the id of its result, where results are kept and made, and the times at which the job's own files were
    changed last, in ns, when their content was read for the id."""

    id: str
    job: Job
    results: Path
    scratch: Path
    times: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """What became of a video: stems of its samples' files in `folder`, rejections, and the length in seconds that its
    file states (0: none). `kept` is false for one that is to be tried again by the next build."""

    id: str
    folder: Path
    samples: tuple[Path, ...]
    rejected: tuple[dict[str, Any], ...]
    length: float
    checksums: dict[str, int]
    kept: bool = True

    @property
    def picture(self) -> Path | None:
        path = self.folder / THUMBNAIL
        return path if path.is_file() else None


@contextmanager
def open_work(out: Path, kept: Path | None) -> Iterator[Work]:
    """The work of a build into `out`, held against other builds: in `out` itself and removed at the end, or with
    results in the folder `kept`, which stay. After an error finished results stay in either case.

    Raises BuildError for a folder that cannot be made, when another build is at work in one of them, and when `out`
    holds shards that no build here has left: a build removes what an earlier start has moved there.
    """
    own = out / FOLDER
    with ExitStack() as stack:
        with _told_of("--out", out):
            _check_out(out)
            stack.enter_context(locked(own, out))
        base = own
        if kept is not None:
            with _told_of("--work", kept):
                stack.enter_context(locked(kept, kept))
            base = kept
        results = base / RESULTS
        texts = base / TEXTS
        for folder in (results, texts):
            folder.mkdir(exist_ok=True)
        for stale in base.glob("scratch-*"):  # of a build that was killed
            shutil.rmtree(stale, ignore_errors=True)
        shutil.rmtree(own / "set", ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix="scratch-", dir=base))
        done = False
        try:
            yield Work(results, texts, scratch, own / "set")
            done = True
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            if done or kept is not None or not any((*results.iterdir(), *texts.iterdir())):
                if not (out / MANIFEST_NAME).exists():
                    remove_own_files(out)  # half a set, which without the folder would be taken for somebody else's
                shutil.rmtree(own, ignore_errors=True)


@contextmanager
def _told_of(option: str, folder: Path) -> Iterator[None]:
    """Faults of the system are BuildErrors that name the option; a full disk stays one."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise
        reason = f"{option} {folder}: {error.strerror}"
        raise BuildError(f"{reason}: expected a folder that can be made and written to") from None


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise BuildError(f"--out {out}: is a file: expected a folder for the shards")
    if not out.exists() or (out / FOLDER).exists() or (out / MANIFEST_NAME).exists():
        return
    if found := own_files(out):
        raise BuildError(f"{found[0]}: exists, without a manifest or work of a build beside it: expected a new or "
                         "empty folder")  # fmt: skip


def perform(task: Task, models: Models) -> Result:
    """Process a video and keep the result. Runs in a worker, whose `models` serve all its tasks. Raises OSError when
    the disk is full."""
    folder = task.scratch / task.id
    shutil.rmtree(folder, ignore_errors=True)  # of a worker that died
    folder.mkdir()
    job = replace(task.job, source="", identity="", key=KEY, scratch=folder)
    outcome = process_video(job, models)
    if times_of(job.video) != task.times:
        detail = "the video or its sidecar was changed or removed while the build was running"
        outcome = Outcome(job.source, (), (rejection(job.source, Reason.E_INTERNAL, detail),))
    picture = thumbnail(job, outcome)
    if picture is not None:
        (folder / THUMBNAIL).write_bytes(picture)
    record = {
        "samples": [stem.name for stem in outcome.samples],
        "rejected": list(outcome.rejected),
        "length": _length(job.video),
        "files": {path.name: _seal(path) for path in sorted(folder.iterdir())},
    }
    publish(folder / RECORD, json.dumps(record).encode())
    if any(entry["reason"] in PASSING for entry in outcome.rejected):
        return replace(_read(folder, task.id), kept=False)
    sync_folder(folder)
    _place(folder, task.results / task.id)
    sync_folder(task.results)
    return _read(task.results / task.id, task.id)


def times_of(video: Path) -> tuple[int, ...]:
    """When a video and the sidecar beside it were changed last, in ns; -1 for one that is not there."""
    return tuple(_time_of(path) for path in (video, video.with_suffix(".json")))


def _time_of(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # also where the sidecar's name would be too long
        return -1


def find_result(results: Path, id: str) -> Result | None:
    """The kept result of an id. One whose files are not those that were written is removed, and None. Raises OSError
    for one that this process cannot read, which may be whole."""
    folder = results / id
    if not folder.is_dir():
        return None
    try:
        return _read(folder, id)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        shutil.rmtree(folder)
        return None


def load_clip(result: Result, stem: Path, job: Job) -> ClipSample:
    """A kept sample under the names of `job`. Raises BuildError for one that is not as it was written."""
    for suffix in (".safetensors", ".json"):
        path = stem.with_suffix(suffix)
        if zlib.crc32(path.read_bytes()) != result.checksums[path.name]:
            raise BuildError(f"{path}: not as it was written: remove {result.folder} and run the same command again")
    sample = load_sample(stem)
    meta = {**sample.meta, "source": job.source}
    return replace(sample, key=job.key + sample.key.removeprefix(KEY), identity=job.identity, meta=meta)


def publish_set(staging: Path, out: Path) -> None:
    """Move a finished set into `out`: the manifest comes last, so that a reader sees all of it or no set."""
    remove_own_files(out)  # of a build that was killed while it did this
    names = sorted(path.name for path in staging.iterdir())
    for name in [*(name for name in names if name != MANIFEST_NAME), MANIFEST_NAME]:
        sync_folder(out)
        os.replace(staging / name, out / name)
    sync_folder(out)


def _place(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # two videos with one content and sidecar, or an orphan
            raise


def _length(video: Path) -> float:
    try:
        return round(duration(video) or 0.0, 3)
    except MediaError:
        return 0.0


def _seal(path: Path) -> list[int]:
    """Bring a file to the disk; its size and crc32."""
    with open(path, "rb+") as file:
        data = file.read()
        os.fsync(file.fileno())
    return [len(data), zlib.crc32(data)]


def _read(folder: Path, id: str) -> Result:
    """Raises OSError, ValueError, KeyError or TypeError for a folder that is not as it was made."""
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    checksums = {}
    for name, (size, checksum) in record["files"].items():
        if (folder / name).stat().st_size != size:
            raise ValueError(f"{folder / name}: expected {size} bytes")
        checksums[name] = checksum
    stems = tuple(folder / name for name in record["samples"])
    return Result(id, folder, stems, tuple(record["rejected"]), record["length"], checksums)
