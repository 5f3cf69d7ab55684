"""Fetch the clips of VFHQ: `python -m tools.download_vfhq ANNOTATIONS OUT`."""

from __future__ import annotations

from tools.download import vfhq
from tools.download.command import make_app

app = make_app(vfhq.read, "Fetch, cut and crop the clips of VFHQ. ANNOTATIONS: a folder of Clip+*.txt files.")

if __name__ == "__main__":
    app()
