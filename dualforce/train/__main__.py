"""`deepspeed --module dualforce.train --run FILE --out DIR`.

Also `torchrun -m dualforce.train -- --run FILE --out DIR` and, for one process, `python -m dualforce.train ...`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from data_shards.remote.fetch import RemoteError
from data_shards.schema import MachineError, ShardError
from dualforce import launch
from dualforce.config import ConfigError, ModelConfig, RunConfig
from dualforce.config_file import load_run
from dualforce.train.agree import AgreedError, together

if TYPE_CHECKING:
    from dualforce.data.buckets import Buckets
    from dualforce.train.loop import Job


def main() -> None:
    """Parse, check, train; a wrong input is one line on stderr and exit code 2."""
    arguments = _parser().parse_args()
    try:
        overrides = list(arguments.set)
        if arguments.seed is not None:
            overrides.append(f"train.seed={arguments.seed}")
        run = load_run(arguments.run, overrides)
        out = arguments.out or Path("runs") / arguments.run.stem
        _check_out(out, arguments.resume)
        job, start = _prepare(run, out, arguments.resume)
    except (MachineError, RemoteError) as error:  # each rank reads for itself
        _leave(error, True)
    except ValueError as error:  # ConfigError and ShardError too
        _leave(error, launch.speaks(isinstance(error, AgreedError)), all_ranks=True)
    from dualforce.data.workers import LoaderError
    from dualforce.train.damage import DamageError
    from dualforce.train.engine import close_engine
    from dualforce.train.loop import train

    try:
        train(job, start)
    except (LoaderError, MachineError, RemoteError) as error:  # of this rank alone
        _leave(error, True)
    except DamageError as error:  # every rank meets it
        _leave(error, launch.is_main(), all_ranks=True)
    except ConfigError as error:  # a checkpoint that cannot be written; every rank meets the same one
        _leave(error, launch.speaks(isinstance(error, AgreedError)), all_ranks=True)
    except ShardError as error:  # a clip's; only the ranks that share the clip meet it, and the first of them speaks
        _leave(error, job.context.grid.sp_rank == 0, all_ranks=job.context.grid.dp == 1)
    close_engine(job.engine)
    launch.finish()


def _leave(error: Exception, speak: bool, all_ranks: bool = False) -> NoReturn:
    """`all_ranks`: for a reason that all of them have."""
    if speak:
        print(f"error: {error}", file=sys.stderr, flush=True)
    if all_ranks:
        launch.wait_for_others()
    raise SystemExit(2) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dualforce.train", description="Train a dual-tower model.")
    parser.add_argument("--run", type=Path, required=True, help="run file, for example ds_configs/runs/tiny.json")
    parser.add_argument("--out", type=Path, help="folder of the run; default: runs/NAME, the run file's name")
    parser.add_argument("--seed", type=int, help="same as --set train.seed=N")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the run file"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by the deepspeed launcher
    return parser


def _check_out(out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; expected a folder for the run")
    # A run that was killed before its first checkpoint was complete begins again; what there is of it is put aside.
    pointer = out / "checkpoints" / "LATEST"
    if not resume and pointer.exists():
        raise ConfigError(f"{out}: holds checkpoints; add --resume to go on, or name another --out")
    if resume and not pointer.exists():
        raise ConfigError(f"{out}: --resume, but there is no {pointer}: expected a complete checkpoint to go on from")


def statistics_of_run(out: Path, buckets: Buckets, allow_new: bool) -> dict[str, Any]:
    """What a resumed run normalises by: the statistics it began with, because its weights mean nothing under others.

    Raises ConfigError for another shard set than the checkpoint's, unless `allow_new`, and for other extractors.
    """
    from dualforce.train.checkpoint import read_state

    state = read_state(out)
    if state.shards != buckets.hash and not allow_new:
        sources = ", ".join(str(opened.source) for opened in buckets.sets)
        raise ConfigError(
            f"{out}: checkpoint of step {state.step}: shards: {state.shards}: expected {buckets.hash}, the hash of "
            f"{sources}, as the order of the clips follows from it (data.allow_new_shards = true goes on with "
            "the other set, in its order)"
        )
    if state.config.get("extractors") != buckets.extractors:
        raise ConfigError(
            f"{out}: checkpoint of step {state.step}: extractors differ from those of data.shards; expected those of "
            "the run's beginning"
        )
    found = state.config.get("statistics")
    if not isinstance(found, dict):
        raise ConfigError(
            f"{out}: checkpoint of step {state.step}: statistics: {type(found).__name__}: expected an object"
        )
    return found


def _with_flame(found: dict[str, Any], run: RunConfig, out: Path, buckets: Buckets) -> dict[str, Any]:
    """A resumed run's statistics with those of FLAME, which earlier runs have not: they took its values as stored.

    Raises ConfigError where such a run's FLAME loss still has a weight: its projection knows other targets.
    """
    from dualforce.losses.total import flame_weight
    from dualforce.train.checkpoint import newest_step

    if "flame" in found or "flame" not in buckets.extractors:
        return found
    step = newest_step(out)
    if flame_weight(run.loss, step) > 0:
        raise ConfigError(
            f"{out}: checkpoint of step {step}: statistics.flame: absent: expected those that FLAME is standardised "
            "with (the run began with FLAME as stored, and loss.flame still counts: begin a new one)"
        )
    return {**found, "flame": buckets.statistics()["flame"]}


def open_shards(run: RunConfig) -> tuple[Buckets, RunConfig]:
    """The sets of `run`, and `run` as it may be told and written: URLs without user, password and query."""
    from data_shards.reader import ShardSet
    from data_shards.remote.source import locate
    from dualforce.data.buckets import Buckets

    cache, most = Path(run.data.cache) if run.data.cache else None, int(run.data.cache_gib * 2**30)
    sets = [ShardSet.open(locate(name, cache, most)) for name in run.data.sets]
    told = [str(opened.source) for opened in sets]
    data = run.data.model_copy(update={"shards": told if isinstance(run.data.shards, list) else told[0]})
    return Buckets(sets, data.lengths), run.model_copy(update={"data": data})


def _prepare(run: RunConfig, out: Path, resume: bool) -> tuple[Job, int]:
    # What needs DeepSpeed or the shards comes after the run file has been checked: a typo answers at once.
    from dualforce.data.statistics import StreamStatistics
    from dualforce.train.setup import model_config, prepare_job

    buckets, run = open_shards(run)
    model = model_config(run, [opened.manifest for opened in buckets.sets])
    if resume:
        values = _with_flame(statistics_of_run(out, buckets, run.data.allow_new_shards), run, out, buckets)
    else:
        values = buckets.statistics()
    statistics = StreamStatistics.from_manifest(values)
    statistics.check_widths(buckets.extractors, str(out / "config.json"))
    grid = launch.start(run.parallel.sequence, run.train.seed)
    content = config_content(run, model, buckets, values)
    job, start = prepare_job(run, model, buckets, statistics, grid, out, resume, content)
    together(grid, lambda: write_config(out, content) if grid.rank == 0 else None)
    return job, start


def config_content(
    run: RunConfig, model: ModelConfig, buckets: Buckets, statistics: Mapping[str, Any]
) -> dict[str, Any]:
    """OUT/config.json: the run, the model, what the shards say of the codecs and sizes, and the statistics."""
    return {
        "run": run.model_dump(mode="json"),
        "model": model.model_dump(mode="json"),
        "extractors": buckets.extractors,
        "statistics": statistics,
        "geometry": buckets.geometry(),
    }


def write_config(out: Path, content: Mapping[str, Any]) -> None:
    """Write OUT/config.json whole or not at all: a resumed run has one already."""
    from dualforce.train.manifest import replace_file

    replace_file(out / "config.json", json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
