"""All real clips in full length: how each ends, what was measured, and whether the crop holds eyes and mouth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.crop_check import crop_boxes, inside_share
from preprocess.test_build_real import MEANT, items, samples_of

from dualforce.preprocess.build import BuildOptions, build_shards


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_clip_ends_as_its_manifest_implies(clips_dir: Path, landmarker_file: Path, tmp_path: Path) -> None:
    options = BuildOptions(face_landmarker=landmarker_file, workers=2)
    report = build_shards(clips_dir / "video", tmp_path / "shards", options)
    samples = [sample for _, sample in samples_of(tmp_path / "shards")]
    print("\n| clip | ends as | samples | speech | sharpness | yaw | clipped | eyes and mouth inside | margin |")
    print("|---|---|---|---|---|---|---|---|---|")
    for item in items(clips_dir):
        name = Path(item["file"]).name
        checks = [sample.meta["checks"] for sample in samples if sample.meta["source"] == name]
        reasons = sorted({entry["reason"] for entry in report.manifest["rejected"] if entry["source"] == name})
        if item["kind"] in MEANT:
            assert not checks and reasons == [MEANT[item["kind"]]], name
            print(f"| `{name}` | `{reasons[0]}` | 0 | | | | | | |")
            continue
        # Every window of the others is used.
        assert len(checks) == round(item["duration_s"] * 25) // 81 and not reasons, (name, len(checks), reasons)
        spans = {key: [check[key] for check in checks] for key in ("speech_share", "sharpness", "yaw_degrees")}
        clipped = max(check["clipped_share"] for check in checks)
        boxes = crop_boxes(tmp_path / "shards", name)
        found = inside_share(clips_dir / "video" / name, boxes, landmarker_file)
        assert found.frames == len(boxes) == 81 * len(checks)
        assert found.share >= 0.99, (name, found)
        shown = " | ".join(f"{np.min(values):.2f} to {np.max(values):.2f}" for values in spans.values())
        print(
            f"| `{name}` | used | {len(checks)} | {shown} | {clipped:.3f} | {found.share:.1%} of {found.frames} | "
            f"{found.margin:.2f} |",
            flush=True,
        )
