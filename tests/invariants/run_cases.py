"""Ranks of test_runs.py that do more than the command line; `helpers.launches` calls them. Not a test module."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from dualforce.presets import PRESETS, Preset
from dualforce.train.__main__ import main
from dualforce.train.setup import model_config


def narrow() -> None:
    """Shrink every preset's widths in this process, keeping depths, bridges and head counts, and run the command."""
    for name, row in list(PRESETS.items()):
        (_, heads_v, _, layers_v), (_, heads_s, _, layers_s) = row.video, row.struct
        video, struct = (4 * heads_v, heads_v, 16, layers_v), (4 * heads_s, heads_s, 16, layers_s)
        PRESETS[name] = Preset(video, struct, row.bridge, (row.audio[0], 12, 12, 3), 8, row.frames_per_chunk)
    main()


def export_case() -> None:
    """Train two steps as the command line says, then save what the engine's own model predicts on a fixed input."""
    from dualforce import launch
    from dualforce.config_file import load_run
    from dualforce.data.statistics import StreamStatistics
    from dualforce.diffusion.frame_noise import draw_fixed
    from dualforce.train.__main__ import config_content, open_shards, write_config
    from dualforce.train.loop import train
    from dualforce.train.setup import prepare_job
    from dualforce.train.validate import forward

    run_file, out, *overrides = sys.argv[1:]
    run = load_run(Path(run_file), overrides)
    buckets, run = open_shards(run)
    model = model_config(run, [opened.manifest for opened in buckets.sets])
    grid = launch.start(run.parallel.sequence, run.train.seed)
    statistics = StreamStatistics.from_manifest(buckets.statistics())
    content = config_content(run, model, buckets, buckets.statistics())
    job, start = prepare_job(run, model, buckets, statistics, grid, Path(out), False, content)
    if grid.rank == 0:
        write_config(Path(out), content)
    train(job, start)
    batch = job.held_out[0].clip(0, 3)
    levels = [0.2, 0.5, 0.9]
    job.engine.eval()
    inputs, output = forward(job.engine, batch, levels, job.context)
    path = job.context.path(inputs.target.video.shape[1] * grid.sp)
    video, struct = path.gather(output.predicted.video), path.gather(output.predicted.struct)
    if grid.rank == 0:
        drawn = draw_fixed(batch, levels, run.train.seed)
        save_file({"video": video.contiguous(), "struct": struct.contiguous(), "sigma": drawn.sigma.video},
                  Path(out) / "predicted.safetensors")  # fmt: skip
        (Path(out) / "norms.json").write_text(json.dumps({"video": float(torch.linalg.norm(video))}))
