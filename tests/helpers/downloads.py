"""A downloader that copies one film, and what a run with it leaves."""

from __future__ import annotations

import json
import shutil
import threading
from fractions import Fraction
from pathlib import Path
from typing import Any

from tools.download.records import Annotations, Clip, PixelRule
from tools.download.run import Options, Report
from tools.download.ytdlp import Request

RULE = PixelRule(Fraction(40), Fraction(30), Fraction(168), Fraction(126), 144)
FAST = Options(workers=1, wait=0)


def clip(name: str, video: str | None = None, start: int = 1, end: int = 2) -> Clip:
    return Clip(name, video or f"{name:_<11}", Fraction(start), Fraction(end), RULE, 144)


def annotated(*clips: Clip) -> Annotations:
    return Annotations("TEST", "CC0-1.0", clips, ())


class Fake:
    """Copies the film for every request, or does what `acts` says for a video: raise one entry after the other."""

    def __init__(self, film: Path, acts: dict[str, list[BaseException]] | None = None) -> None:
        self.film, self.acts, self.asked = film, acts or {}, []  # type: ignore[var-annotated]
        self.most = self.now = 0
        self.lock = threading.Lock()
        self.meet: threading.Barrier | None = None

    def fetch(self, request: Request) -> Path:
        with self.lock:
            self.asked.append(request)
            self.now += 1
            self.most = max(self.most, self.now)
            act = self.acts[request.video].pop(0) if self.acts.get(request.video) else None
        try:
            assert not any(request.folder.iterdir())
            (request.folder / "source.mp4.part").write_bytes(b"half")
            if self.meet is not None:
                self.meet.wait(20)
            if act is not None:
                raise act
            return Path(shutil.copy(self.film, request.folder / "source.mp4"))
        finally:
            with self.lock:
                self.now -= 1

    @property
    def videos(self) -> list[str]:
        return [request.video for request in self.asked]


def states(report: Report) -> dict[str, str]:
    return {name: f"{o.state} {o.reason or ''}".strip() for name, o in report.outcomes.items()}


def files(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "clips").iterdir())


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
