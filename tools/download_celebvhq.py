"""Fetch the clips of CelebV-HQ: `python -m tools.download_celebvhq ANNOTATIONS OUT`."""

from __future__ import annotations

from tools.download import celebvhq
from tools.download.command import make_app

app = make_app(celebvhq.read, "Fetch, cut and crop the clips of CelebV-HQ. ANNOTATIONS: celebvhq_info.json.")

if __name__ == "__main__":
    app()
