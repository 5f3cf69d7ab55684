"""From the results of all videos to the shard set and its report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_shards.schema import ClipSample
from data_shards.writer import ShardSetWriter
from dualforce.preprocess.errors import BuildError
from dualforce.preprocess.progress import BuildProgress
from dualforce.preprocess.report import PAGE, Entry, Made, Tally, write_report
from dualforce.preprocess.split import split_identities
from dualforce.preprocess.work import Work, load_clip, publish_set


@dataclass(frozen=True)
class Results:
    """What became of the videos that were worked on, by name, and every rejection, in order."""

    entries: list[Entry]
    rejected: list[dict[str, Any]]


@dataclass(frozen=True)
class Terms:
    """What is said of samples beside what is in them: share of identities held out, licence of videos whose sidecar
    names none, and where the videos come from (None: not known)."""

    validation_share: float
    licence: str | None
    origin: str | None


@dataclass(frozen=True)
class Making:
    """How the set is made: table of extractors, all networks with a part in it, facts for the manifest, terms, and when
    the build began (monotonic)."""

    extractors: dict[str, dict[str, Any]]
    networks: list[dict[str, Any]]
    info: Mapping[str, Any]
    terms: Terms
    begun: float


def assemble(
    src: Path, out: Path, work: Work, results: Results, making: Making, progress: BuildProgress
) -> dict[str, Any]:
    """Write shards and report, and move them into `out` as a whole; returns the manifest.

    Raises BuildError when no video gave a sample; the report is then alone in `out`.
    """
    tally = Tally(tuple(making.extractors["motion"].get("names", ())))
    used = [entry for entry in results.entries if entry.result.samples]
    info = {**making.info, "videos_used": len(used)}
    made = Made(
        results.entries, results.rejected, tally, making.extractors, making.networks, info, None, making.begun, _now()
    )
    if not used:
        write_report(out, replace(made, seconds=time.monotonic() - making.begun))
        raise BuildError(f"{src}: no video gave a sample: {_first(results.rejected)} (see {out / PAGE})")
    splits = split_identities((entry.job.identity for entry in used), making.terms.validation_share)
    with ShardSetWriter(work.staging, making.extractors) as writer:
        stems = [(entry, stem) for entry in used for stem in entry.result.samples]
        for entry, stem in progress.track(stems, len(stems), "writing shards"):
            sample = _with_terms(load_clip(entry.result, stem, entry.job), making.terms)
            writer.add(splits[sample.identity], sample)
            tally.add(sample)
        manifest = writer.finish(results.rejected, {**info, "licences": dict(sorted(tally.licences.items()))})
    write_report(work.staging, replace(made, manifest=manifest, seconds=time.monotonic() - making.begun))
    publish_set(work.staging, out)
    return manifest


def _with_terms(sample: ClipSample, terms: Terms) -> ClipSample:
    """The sample with licence and origin in its meta, where they are known."""
    told = {"licence": sample.meta.get("licence") or terms.licence, "origin": terms.origin}
    return replace(sample, meta={**sample.meta, **{name: value for name, value in told.items() if value is not None}})


def _first(rejected: list[dict[str, Any]]) -> str:
    reasons = "; ".join(f"{entry['source']}: {entry['reason']}: {entry['detail']}" for entry in rejected[:5])
    return f"{reasons}; and {len(rejected) - 5} more" if len(rejected) > 5 else reasons


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
