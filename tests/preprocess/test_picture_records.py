"""What was put right in the pictures of a video stands in its samples and in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import odd_videos as odd
from helpers.clips import sidecar_json, write_sidecar
from helpers.odd_videos import FRAMES, SIZE, make

from data_shards.reader import ShardSet
from dualforce.preprocess.build import BuildOptions, build_shards
from dualforce.preprocess.quality import Limits

INTERLACED = {"x264-params": "tff=1", "flags": "+ildct+ilme"}
HDR = {"bits": 10, "transfer": "smpte2084", "primaries": "bt2020", "colour": "bt709-eetf-1000-203-v1"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain.mp4": ({}, {}),
    "full.mp4": ({"pix_fmt": "yuvj420p", "touch": odd.full_range}, {}),
    "hdr.mp4": ({"pix_fmt": "yuv420p10le", "touch": odd.hdr}, HDR),
    "ten.mp4": ({"pix_fmt": "yuv420p10le"}, {"bits": 10}),
    "interlaced.ts": ({"options": INTERLACED}, {"interlaced": True, "deinterlacer": "bwdif"}),
    "turned.mp4": ({"touch": odd.rotated(90)}, {"rotation": 90}),
    "wide.mp4": ({"touch": odd.wide_pixels}, {"pixel_aspect": "2:1"}),
    "alpha.mov": ({"codec": "qtrle", "pix_fmt": "argb"}, {"alpha": "ignored"}),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of one video of each kind."""
    folder = tmp_path_factory.mktemp("records")
    (folder / "clips").mkdir()
    box = [SIZE[0] / 4, SIZE[1] / 4, 3 * SIZE[0] / 4, 3 * SIZE[1] / 4]
    for name, (options, _) in CASES.items():
        make(folder / "clips" / name, **options)
        write_sidecar(folder / "clips" / name, sidecar_json(FRAMES, identity=name, face_boxes=[box] * FRAMES))
    build_shards(folder / "clips", folder / "shards", BuildOptions(size=16, limits=Limits(), workers=1))
    return folder / "shards"


def test_samples_say_what_was_put_right(built: Path) -> None:
    """And of ordinary pictures nothing."""
    shards = ShardSet.open(built)
    found = {}
    for split in ("train", "validation"):
        part = shards.split(split)
        for place in range(len(part)):
            meta = part.read(place).meta
            found[meta["source"]] = meta["file"].get("pictures", {})
    assert found == {name: wanted for name, (_, wanted) in CASES.items()}


def test_the_report_counts_it(built: Path) -> None:
    facts = json.loads((built / "report.json").read_text())
    assert facts["pictures"] == {
        "alpha: ignored": 1, "bits: 10": 2, "colour: bt709-eetf-1000-203-v1": 1, "deinterlacer: bwdif": 1,
        "interlaced: True": 1, "pixel_aspect: 2:1": 1, "primaries: bt2020": 1, "rotation: 90": 1,
        "transfer: smpte2084": 1,
    }  # fmt: skip
    assert "<td>transfer: smpte2084</td>" in (built / "report.html").read_text()
