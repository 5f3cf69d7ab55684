"""Fetch the clips of HDTF: `python -m tools.download_hdtf ANNOTATIONS OUT`."""

from __future__ import annotations

from tools.download import hdtf
from tools.download.command import make_app

app = make_app(hdtf.read, "Fetch, cut and crop the clips of HDTF. ANNOTATIONS: the folder HDTF_dataset.")

if __name__ == "__main__":
    app()
