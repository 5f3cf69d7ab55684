"""One generation from start to end: model folder, image and sound in, mp4 out."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dualforce.codecs.media import write_video
from dualforce.generate.inputs import GenerateError, Prepared, Sources, prepare
from dualforce.generate.rollout import FinishedChunk, RolloutSettings, rollout
from dualforce.generate.video import pictures
from dualforce.model.dual_tower import DualTower
from dualforce.types import FPS
from megatron_ext.kernels.kernel_set import KernelSet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """How to sample. `lag` and `horizon` shape the pyramid mode; `window` None is the model's own."""

    steps: int = 20
    seed: int = 0
    cfg_text: float = 1.0
    cfg_audio: float = 1.0
    mode: Literal["ar", "pyramid"] = "ar"
    lag: int = 1
    horizon: int = 4
    window: int | None = None


def generate(
    model: DualTower, config: dict[str, Any], kernels: KernelSet, sources: Sources, sampling: Sampling, out: Path,
    origin: str,
) -> int:  # fmt: skip
    """Write the talking video to `out` and return its number of pictures. `config` is the model folder's, `origin` its
    name in errors. Chunks are decoded and encoded as they are finished.

    Raises GenerateError and the errors of the codecs, each with one line.
    """
    if out.suffix != ".mp4":
        raise GenerateError(f"--out {out}: expected a name that ends in .mp4")
    if out.is_dir():
        raise GenerateError(f"--out {out}: is a folder; expected a file")
    if sampling.cfg_text != 1.0 and sources.text is None and sources.prompt is None:
        raise GenerateError(
            f"--cfg-text {sampling.cfg_text}: needs --text TEXT or --text-embedding FILE: expected 1 without a text"
        )
    prepared = prepare(sources, config, model.config, origin, next(model.parameters()).device)
    settings = rollout_settings(sampling, config["noise"], model, origin)
    frames = len(prepared.inputs.audio)
    logger.info(
        "%d pictures (%.2f s) in %d latent frames, %s, %d steps, motion %s",
        prepared.pixel_frames, prepared.pixel_frames / FPS, frames, sampling.mode, sampling.steps,
        "sampled" if prepared.inputs.struct is None else "given",
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    chunks = rollout(model, kernels, prepared.inputs, settings)
    return _write(out, chunks, prepared, frames)


def rollout_settings(sampling: Sampling, noise: dict[str, Any], model: DualTower, origin: str) -> RolloutSettings:
    """Sampling options and the model's noise schedule as rollout settings; GenerateError names what is out of range."""
    for name in ("steps", "lag", "horizon", "window"):
        value = getattr(sampling, name)
        if value is not None and value < 1:
            raise GenerateError(f"--{name} {value}: expected at least 1")
    for name, scale in (("cfg-text", sampling.cfg_text), ("cfg-audio", sampling.cfg_audio)):
        if not math.isfinite(scale):
            raise GenerateError(f"--{name} {scale}: expected a finite number")
    for key in ("shift_video", "sample_shift_struct"):
        if not isinstance(noise.get(key), int | float) or not noise[key] > 0:
            raise GenerateError(f"{origin}: noise.{key} = {noise.get(key)!r}: expected a number above 0")
    pyramid = sampling.mode == "pyramid"
    return RolloutSettings(
        steps=sampling.steps,
        seed=sampling.seed,
        shift_video=noise["shift_video"],
        shift_struct=noise["sample_shift_struct"],
        text_scale=sampling.cfg_text,
        audio_scale=sampling.cfg_audio,
        lag=sampling.lag if pyramid else sampling.steps,
        horizon=sampling.horizon if pyramid else 1,
        window=sampling.window or model.config.window,
        sink=model.config.sink,
    )


def _write(out: Path, chunks: Iterable[FinishedChunk], prepared: Prepared, frames: int) -> int:
    columns = (
        TextColumn("generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("latent frames"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task("generating", total=frames)

        def watched() -> Iterator[FinishedChunk]:
            for chunk in chunks:
                yield chunk
                bar.advance(task, chunk.span.length)

        shown = pictures(watched(), prepared.statistics, prepared.codec, prepared.pixel_frames)
        written = write_video(out, shown, prepared.wave)
        bar.update(task, completed=frames)
    return written
