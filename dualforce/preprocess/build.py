"""All videos of a folder to one shard set. The result depends on the files and options only, not on the workers, nor on
how often the build was killed and started again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console

from data_shards.reader import ShardSet
from data_shards.schema import ShardError
from dualforce.preprocess.assemble import Making, Results, Terms, assemble
from dualforce.preprocess.content_id import ContentHashes, content_id, digest, surroundings
from dualforce.preprocess.devices import deal, kind_of_devices
from dualforce.preprocess.errors import BuildError, is_disk_full
from dualforce.preprocess.files import find_videos
from dualforce.preprocess.job import Job, rejection
from dualforce.preprocess.models import Models
from dualforce.preprocess.networks import networks_of
from dualforce.preprocess.options import BuildOptions
from dualforce.preprocess.plan import Plan, extractors_of, make_plan
from dualforce.preprocess.pool import run_tasks
from dualforce.preprocess.progress import BuildProgress
from dualforce.preprocess.reasons import Reason
from dualforce.preprocess.report import Entry
from dualforce.preprocess.work import FOLDER, Result, Task, Work, find_result, open_work, perform, times_of


@dataclass(frozen=True)
class BuildReport:
    """The manifest as written and what the build took. `videos` counts files, `used` those that gave a sample,
    `earlier` those that an earlier start had finished."""

    manifest: dict[str, Any]
    videos: int
    used: int
    seconds: float
    earlier: int = 0


def build_shards(src: Path, out: Path, options: BuildOptions, console: Console | None = None) -> BuildReport:
    """Build the shard set `out` from the videos under `src`, or what is missing of it after an interrupted build.

    A set that this very build made before is left as it is. Raises BuildError (no video, a device that is not there,
    motion tags mixed, no face landmarker where one is needed, another build in `out`, a full disk, nothing usable),
    CodecError (a model file that cannot be used) and ShardError (`out` holds another set). Finished videos are
    kept in `out` whenever the build does not come to its end. Shows progress on `console` (default: standard error).
    """
    begun = time.monotonic()
    options.check()
    device = kind_of_devices(options.devices)
    videos = find_videos(src)
    if not videos:
        raise BuildError(f"{src}: no video file: expected mp4, mkv, mov, webm, avi or the like in it")
    try:
        with open_work(out, options.work) as work, BuildProgress(console or Console(stderr=True)) as progress:
            times = {video: times_of(video) for video in videos}  # before anything is read
            plan = make_plan(src, videos, options, work, progress)
            extractors = extractors_of(options, plan)
            hashes = ContentHashes()
            tasks = _tasks(plan.jobs, work, surroundings(extractors, device), times, hashes)
            networks = networks_of(options, extractors, plan.faces, plan.sidecars, hashes)
            info = _info(options, len(videos), plan, tasks, extractors)
            if (out / "manifest.json").exists():
                manifest = _there(out, info["build"])
                return BuildReport(manifest, len(videos), manifest["info"]["videos_used"], 0.0, len(videos))
            info["networks"] = networks
            results = _run(tasks, plan.rejected, options, progress)
            terms = Terms(options.validation_share, options.licence, options.origin)
            manifest = assemble(src, out, work, results, Making(extractors, networks, info, terms, begun), progress)
    except OSError as error:
        if is_disk_full(error):
            kept = options.work or out / FOLDER
            told = f"finished videos are kept in {kept}: " if kept.is_dir() else ""  # it goes where none is finished
            raise BuildError(f"{out}: {error.strerror}: {told}make room and run the same command again") from None
        raise
    used, earlier = manifest["info"]["videos_used"], sum(entry.earlier for entry in results.entries)
    return BuildReport(manifest, len(videos), used, time.monotonic() - begun, earlier)


def _tasks(
    jobs: list[Job], work: Work, around: Mapping[str, Any], times: Mapping[Path, tuple[int, ...]], hashes: ContentHashes
) -> list[Task]:
    return [Task(content_id(job, around, hashes), job, work.results, work.scratch, times[job.video]) for job in jobs]


def _run(tasks: list[Task], rejected: list[dict[str, Any]], options: BuildOptions, progress: BuildProgress) -> Results:
    """Results in the order of the tasks: those kept from an earlier start, and the others, made now."""
    found = {task.id: result for task in tasks if (result := find_result(task.results, task.id)) is not None}
    earlier = set(found)
    if earlier:
        progress.say(
            f"{sum(task.id in earlier for task in tasks)} of {len(tasks)} videos were finished by an earlier start"
        )
    missing = sorted((task for task in tasks if task.id not in found), key=lambda task: -task.job.bytes)
    todo = list({task.id: task for task in missing}.values())
    done = (
        (result or _crashed(task), task.job.bytes, result.length if result else 0.0)
        for task, result in run_tasks(todo, perform, deal(options.devices, options.workers), Models)
    )
    for result in progress.videos(done, len(todo), sum(task.job.bytes for task in todo)):
        found[result.id] = result
    entries = [Entry(task.job, found[task.id], task.id in earlier) for task in tasks]
    named = ({**rejected, "source": entry.job.source} for entry in entries for rejected in entry.result.rejected)
    place = itemgetter("source", "scene", "window")
    order = sorted([*rejected, *named], key=lambda entry: place({"scene": -1, "window": -1, **entry}))
    return Results(entries, order)


def _crashed(task: Task) -> Result:
    detail = "the process that read it died (killed, out of memory, or a fault in a decoder)"
    return Result(task.id, task.scratch, (), (rejection("", Reason.E_CRASH, detail),), 0.0, {}, kept=False)


def _there(out: Path, build: str) -> dict[str, Any]:
    """The manifest of the set in `out`, if this build made it; raises ShardError for another or a damaged one."""
    manifest = ShardSet.open(out).manifest
    if manifest.get("info", {}).get("build") != build:
        raise ShardError(
            f"{out / 'manifest.json'}: a shard set exists here, of other videos or options, or made by another version "
            "of the code: expected a new folder"
        )
    return dict(manifest)


def _info(
    options: BuildOptions, videos: int, plan: Plan, tasks: list[Task], extractors: dict[str, Any]
) -> dict[str, Any]:
    """What the manifest says about the build. `build` is a hash of all that the set depends on."""
    info = {
        "videos": videos,
        "size": options.size,
        "limits": asdict(options.limits),
        "validation_share": options.validation_share,
        "licence": options.licence,
        "origin": options.origin,
        **({"face_detector": plan.faces} if plan.faces else {}),
    }
    names = [(task.id, task.job.source, task.job.key, task.job.identity) for task in tasks]
    return {**info, "build": digest([info, extractors, names, plan.rejected])}
