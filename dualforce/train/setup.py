"""From a run file and a shard set to a job: the checks that need both, and the construction in order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from data_shards.schema import PIXELS_PER_LATENT, shown
from dualforce import launch
from dualforce.codecs.protocols import VideoCodec
from dualforce.config import ConfigError, ModelConfig, RunConfig
from dualforce.config_errors import describe
from dualforce.data.buckets import Buckets
from dualforce.data.loader import StepLoader
from dualforce.data.statistics import StreamStatistics
from dualforce.data.steps import Deal
from dualforce.model.bridge import bridge_layers
from dualforce.model.path import ChunkRule
from dualforce.model.placement import Place
from dualforce.presets import build_model_config
from dualforce.train.agree import together
from dualforce.train.checkpoint import SavedState, read_state
from dualforce.train.checkpoint import resume as resume_checkpoint
from dualforce.train.deepspeed_file import check_deepspeed_file
from dualforce.train.engine import (
    BatchPlan,
    build_engine,
    compute_dtype,
    deepspeed_config,
    optimizer_name,
    plan_batch,
)
from dualforce.train.gather_unit import layouts_of
from dualforce.train.loop import Job
from dualforce.train.metrics import RunLog
from dualforce.train.sample_frames import sample_codec
from dualforce.train.step import StepContext, prepare_step
from dualforce.train.train_module import TrainModule
from dualforce.train.validate import HeldOut
from megatron_ext.kernels.kernel_set import KernelSet, select_kernels
from megatron_ext.parallel.grid import ProcessGrid, check_heads

logger = logging.getLogger(__name__)


def model_config(run: RunConfig, manifests: Sequence[Mapping[str, Any]]) -> ModelConfig:
    """The model of a run on shard sets with `manifests`; ConfigError when the run's choices do not fit each other or
    the shards. Widths are the first set's: `Buckets` checks that the others have the same."""
    extractors = manifests[0]["extractors"]
    try:
        model = build_model_config(
            run.preset,
            struct_dim=extractors["motion"]["width"],
            audio_dim=extractors["audio"]["width"],
            overrides=run.model,
        )
    except ValidationError as error:
        raise ConfigError(f"model on {run.data.sets[0]}: {describe(error, ModelConfig)}") from None
    bridge_layers(model)
    for name, frames, manifest in zip(run.data.sets, run.data.lengths, manifests, strict=True):
        _check_bucket(model, name, frames, manifest)
    check_heads(run.parallel.sequence, {"video.heads": model.video.heads, "struct.heads": model.struct.heads})
    return model


def _check_bucket(model: ModelConfig, name: str, frames: int, manifest: Mapping[str, Any]) -> None:
    """ConfigError where clips of `frames` latent frames of the set `name` do not fit the model."""
    video = manifest["extractors"]["video"]
    if video["channels"] != model.video.out_dim:
        raise ConfigError(f"{name}: video has {video['channels']} channels; expected {model.video.out_dim}")
    for side in ("height", "width"):
        if video[side] % model.video.patch:
            raise ConfigError(f"{name}: latent {side} {video[side]}; expected a multiple of {model.video.patch}")
    if (size := manifest.get("pixel_size")) != PIXELS_PER_LATENT * video["height"]:
        expected = f"{PIXELS_PER_LATENT * video['height']}, {PIXELS_PER_LATENT} times the latent height"
        raise ConfigError(f"{name}: pixel_size {shown(size)}; expected {expected}")
    text = manifest["extractors"].get("text")
    if text is not None and text["width"] != model.video.text_dim:
        expected = f"{model.video.text_dim}, that of the preset {model.preset}"
        raise ConfigError(f"{name}: text has width {text['width']}; expected {expected}")
    chunk = model.frames_per_chunk
    if frames == 1 or (frames - 1) % chunk:
        expected = f"1 + k * {chunk} (frame 0, which validation does not count, and at least one whole chunk)"
        example = 1 + max(1, (frames - 1) // chunk) * chunk
        raise ConfigError(f"data.frames = {frames}: expected {expected}, for example {example}")
    if frames > manifest["frames"]:
        raise ConfigError(f"data.frames = {frames}: the clips in {name} have {manifest['frames']} latent frames")


def with_graphs(run: RunConfig, kernels: KernelSet) -> bool:
    """Whether layers run as CUDA graphs: as the run file says; where it is silent, with the fused kernels.

    FlexAttention compiles when it meets a new length, which no capture can hold; what waits in host memory, neither.
    ConfigError where graphs would hold exchanges in expandable memory, which was seen to hang.
    """
    chosen = run.parallel.graphs
    if chosen is None:
        chosen = kernels.name == "fused" and run.parallel.recompute != "offload"
        logger.info(
            "CUDA graphs: %s, with kernels %s and recompute %s (parallel.graphs decides otherwise)",
            "on" if chosen else "off", kernels.name, run.parallel.recompute,
        )  # fmt: skip
    if chosen and run.parallel.sequence > 1 and launch.expandable_segments():
        raise ConfigError(
            f"parallel.sequence = {run.parallel.sequence} with CUDA graphs and expandable_segments:True in "
            "PYTORCH_ALLOC_CONF: NCCL hangs; expected the variable without it, or parallel.graphs = false"
        )
    return chosen


class _Choices(NamedTuple):
    """What follows from the run, the device and the ranks before any rank waits for another."""

    plan: BatchPlan
    config: dict[str, Any]  # DeepSpeed's
    kernels: KernelSet
    graphs: bool
    sample_codec: Callable[[], VideoCodec] | None


def _choose(run: RunConfig, model: ModelConfig, buckets: Buckets, grid: ProcessGrid) -> _Choices:
    """ValueError for what cannot be, with one line; on this rank, whose machine may lack what others have."""
    plan = plan_batch(run.data.clips_per_step, grid.dp, run.data.max_micro_batch)
    config = deepspeed_config(run, plan, grid.world)
    check_deepspeed_file(Path(run.deepspeed), config)
    kernels = select_kernels(run.kernels, grid.device, compute_dtype(config), model.head_dims)
    show = sample_codec(buckets.extractors["video"]["tag"], run.data.video_codec, grid.device)
    return _Choices(plan, config, kernels, with_graphs(run, kernels), show)


def prepare_job(
    run: RunConfig,
    model: ModelConfig,
    buckets: Buckets,
    statistics: StreamStatistics,
    grid: ProcessGrid,
    out: Path,
    resume: bool,
    content: Mapping[str, Any],
) -> tuple[Job, int]:
    """Build the engine, restore it when resuming, and open the data where it goes on; returns (job, steps done).
    `content` is that of OUT/config.json, which checkpoints keep."""
    chosen = together(grid, partial(_choose, run, model, buckets, grid))
    plan, config, kernels = chosen.plan, chosen.config, chosen.kernels
    flame = buckets.extractors.get("flame")

    def build(place: Place) -> TrainModule:
        return TrainModule(model, run.loss, kernels, flame and flame["width"], place)

    engine = build_engine(build, config, grid, run.parallel.recompute, chosen.graphs)
    stage = config.get("zero_optimization", {}).get("stage", 0)
    blank = SavedState(
        step=0,
        world=grid.world,
        sequence=grid.sp,
        zero_stage=stage,
        run=run.model_dump(mode="json"),
        engine=config,
        units=layouts_of(engine.module),
        optimizer=optimizer_name(engine),
        shards=buckets.hash,
        config={key: value for key, value in content.items() if key != "run"},
    )
    start = resume_checkpoint(engine, out, blank, grid) if resume else 0
    damaged = damaged_before(out, run, buckets) if resume else ()
    context = StepContext(run, grid, kernels, ChunkRule(model.frames_per_chunk, model.window, model.sink))
    deal = Deal(
        statistics=statistics,
        data=run.data,
        context=model.audio.context,
        text_dim=model.video.text_dim,
        seed=run.train.seed,
        dp_rank=grid.dp_rank,
        dp_size=grid.dp,
        micro_batch=plan.micro_batch,
    )
    stop = min(run.train.steps, run.train.stop_at or run.train.steps)
    finish = partial(prepare_step, context=context)
    loader = together(grid, lambda: StepLoader(buckets.sets, deal, start, stop, finish, damaged))
    out.mkdir(parents=True, exist_ok=True)
    job = Job(
        engine=engine,
        context=context,
        loader=loader,
        held_out=_held_out(buckets, statistics, model),
        log=RunLog(out, grid.rank == 0, start if resume else None),
        run_dir=out,
        sample_codec=chosen.sample_codec,
        state=replace(blank, damaged=damaged),
        tokens=buckets.tokens(model.video.patch),
    )
    return job, start


def damaged_before(out: Path, run: RunConfig, buckets: Buckets) -> tuple[tuple[int, str], ...]:
    """The damaged clips that a run's newest checkpoint counts; of other shard sets none.

    Raises ConfigError where they are more than the run may have.
    """
    saved = read_state(out)
    found = saved.damaged if saved.shards == buckets.hash else ()
    if len(found) > run.data.max_damaged:
        raise ConfigError(
            f"data.max_damaged: {run.data.max_damaged}: expected at least {len(found)}, the damaged clips of the first "
            f"{saved.step} steps of {out}"
        )
    return found


def _held_out(buckets: Buckets, statistics: StreamStatistics, model: ModelConfig) -> tuple[HeldOut, ...]:
    found = (
        HeldOut(opened.split("validation"), frames, name, statistics, model.audio.context, model.video.text_dim)
        for opened, frames, name in zip(buckets.sets, buckets.lengths, buckets.names(), strict=True)
    )
    return tuple(one for one in found if len(one.reader))
