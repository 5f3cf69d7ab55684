"""What a build made, for people (`report.html`) and for programs (`report.json`).

The page is one file that needs no server and no network: pictures are data URIs, histograms inline SVG, and a policy in
its head forbids scripts and requests. Names come from strangers' files: every one is escaped, and what does not print
is written as its code.
"""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from data_shards.files import publish
from data_shards.schema import ClipSample, licence_of
from dualforce import __version__
from dualforce.preprocess.charts import HEIGHT, WIDTH, Histogram, histogram
from dualforce.preprocess.job import Job
from dualforce.preprocess.reasons import part_of
from dualforce.preprocess.work import Result

PAGE, FACTS = "report.html", "report.json"
TEMPLATE = "report.html.j2"
THUMBNAILS = 48  # pictures of a contact sheet
LINES = 500  # rejections listed on the page; report.json has all
MAX_PICTURE = 40_000  # bytes
TITLES = {
    "face_pixels": "longer side of the face, pixels of the source",
    "face_rate": "share of looks with a face",
    "rival_rate": "share of looks with a second face",
    "loudness": "loudness of the video, dB of full scale",
    "yaw": "mean yaw of the sample, as the motion extractor gives it",
    "sound_minus_video_s": "sound minus pictures, s",
    "sound_start_s": "start of the sound, s",
    "sound_holes_s": "holes in the sound, s",
}


@dataclass
class Tally:
    """Figures of the samples, gathered while they are written; `names` are those of the motion's numbers."""

    names: tuple[str, ...] = ()
    values: dict[str, list[float]] = field(default_factory=dict)
    licences: Counter[str] = field(default_factory=Counter)
    pictures: Counter[str] = field(default_factory=Counter)

    def add(self, sample: ClipSample) -> None:
        """Count a sample: every number among its checks, its loudness, where motion has one its yaw, its licence, and
        what was put right in its pictures."""
        for name, value in sample.meta.get("checks", {}).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                if name == "rms":
                    name, value = "loudness", 20 * math.log10(max(value, 1e-6))
                self.values.setdefault(name, []).append(float(value))
        if "yaw" in self.names:
            yaw = float(sample.struct[:, :, self.names.index("yaw")].mean())
            self.values.setdefault("yaw", []).append(yaw)
        self.licences[licence_of(sample.meta)] += 1
        treated = sample.meta.get("file", {}).get("pictures", {})
        self.pictures.update(f"{name}: {value}" for name, value in treated.items())

    def histograms(self) -> list[Histogram]:
        """One for each figure."""
        return [histogram(TITLES.get(name, name.replace("_", " ")), values) for name, values in self.values.items()]


@dataclass(frozen=True)
class Entry:
    """A video: its job, its result, and whether the result was there when the build began."""

    job: Job
    result: Result
    earlier: bool = False


@dataclass(frozen=True)
class Made:
    """All that a report tells; `networks` as networks.py lists them.

    `manifest` is None when no video gave a sample; `seconds` is the time of this run."""

    entries: list[Entry]
    rejected: list[dict[str, Any]]
    tally: Tally
    extractors: Mapping[str, Mapping[str, Any]]
    networks: list[dict[str, Any]]
    info: Mapping[str, Any]
    manifest: Mapping[str, Any] | None
    seconds: float
    date: str


def write_report(folder: Path, made: Made) -> None:
    """Write both files into `folder`. Raises OSError, and BuildError without Jinja2."""
    facts = _facts(made)
    publish(folder / FACTS, json.dumps(facts, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n")
    publish(folder / PAGE, _page(made, facts).encode())


def _facts(made: Made) -> dict[str, Any]:
    used = [entry for entry in made.entries if entry.result.samples]
    lengths = [entry.result.length for entry in used if entry.result.length]
    whole: Counter[str] = Counter(entry["reason"] for entry in made.rejected if part_of(entry) == "all")
    parts: Counter[str] = Counter(entry["reason"] for entry in made.rejected if part_of(entry) != "all")
    charts = [histogram("length of the videos used, s", lengths)] if lengths else []
    return {
        "format": "dualforce-build-report",
        "version": 1,
        "dualforce": __version__,
        "date": made.date,
        "seconds": round(made.seconds, 1),
        "videos": made.info["videos"],
        "videos_used": len(used),
        "videos_done_earlier": sum(entry.earlier for entry in made.entries),
        "hours_used": round(sum(lengths) / 3600, 4),
        "samples": sum(len(entry.result.samples) for entry in used),
        "splits": {
            name: {"samples": split["samples"], "identities": len(split["identities"])}
            for name, split in (made.manifest["splits"] if made.manifest else {}).items()
        },
        "reasons": {reason: {"videos": whole[reason], "windows": parts[reason]} for reason in sorted({*whole, *parts})},
        "rejected": made.rejected,
        "licences": dict(sorted(made.tally.licences.items())),
        "pictures": dict(sorted(made.tally.pictures.items())),
        "extractors": made.extractors,
        "networks": made.networks,
        "origins": {entry["tag"]: entry["origin"] for entry in made.networks},
        "info": made.info,
        "histograms": [asdict(chart) for chart in [*charts, *made.tally.histograms()]],
    }


def _page(made: Made, facts: Mapping[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, finalize=printable, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((files("dualforce.preprocess") / TEMPLATE).read_text(encoding="utf-8"))
    charts = [Histogram(**chart) for chart in facts["histograms"]]
    return template.render(
        part_of=part_of,
        facts=facts,
        accepted=_accepted(made.entries),
        refused=_refused(made.entries),
        charts=charts,
        width=WIDTH,
        height=HEIGHT,
        lines=facts["rejected"][:LINES],
        more=max(0, len(facts["rejected"]) - LINES),
    )


def printable(value: Any) -> Any:
    """Text whose every character prints: others, such as those that turn the line around, become escapes."""
    if type(value) is not str:
        return value
    return "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape", "surrogatepass").decode("ascii")
        for char in value
    )


def _accepted(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """At most THUMBNAILS videos that gave samples, from all over the list."""
    used = [entry for entry in entries if entry.result.samples]
    step = max(1.0, len(used) / THUMBNAILS)
    chosen = [used[int(number * step)] for number in range(min(len(used), THUMBNAILS))]
    return [
        {"name": e.job.source, "words": f"{len(e.result.samples)} samples", "data": _data(e.result)} for e in chosen
    ]


def _refused(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """At most THUMBNAILS videos without a sample: the first of every reason, the second of every reason, and so on."""
    ranked, seen = [], Counter[str]()
    for entry in entries:
        if not entry.result.samples and entry.result.rejected:
            first = entry.result.rejected[0]
            seen[first["reason"]] += 1
            ranked.append((seen[first["reason"]], first["reason"], entry, first))
    ranked.sort(key=lambda item: item[:2])
    return [
        {"name": entry.job.source, "words": f"{reason}: {first['detail']}", "data": _data(entry.result)}
        for _, reason, entry, first in ranked[:THUMBNAILS]
    ]


def _data(result: Result) -> str | None:
    path = result.picture
    if path is None or path.stat().st_size > MAX_PICTURE:
        return None
    return "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
