"""Configuration: the model, and a run that trains it. What is in a file is read by `config_file`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from dualforce.config_errors import describe


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line for the user."""


class Section(BaseModel):
    """Part of a configuration: immutable, strict in types, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


BridgeStrategy = Literal["shallow_focus", "distributed", "progressive", "custom", "full"]
BridgeDirections = Literal["both", "s2v", "v2s", "none"]


class TowerConfig(Section):
    """One transformer tower (model table: Wan's hyper-parameters)."""

    dim: int = Field(gt=0, description="width")
    heads: int = Field(gt=0, description="attention heads")
    ffn: int = Field(gt=0, description="hidden width of the MLP")
    layers: int = Field(gt=0, description="transformer blocks")
    in_dim: int = Field(gt=0, description="channels of the input")
    out_dim: int = Field(gt=0, description="channels of the prediction")
    patch: int = Field(gt=0, description="spatial patch edge; 1 for the structure tower")
    text_dim: int = Field(default=4096, gt=0, description="width of the text embedding")
    text: bool = Field(default=True, description="blocks have text cross-attention")
    freq_dim: int = Field(default=256, gt=0, multiple_of=4, description="width of the sinusoid of the noise level")
    eps: float = Field(default=1e-6, gt=0, description="epsilon of the norms")

    @model_validator(mode="after")
    def _check(self) -> TowerConfig:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim {self.dim} over {self.heads} heads: expected an even whole head size")
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.heads


class BridgeConfig(Section):
    """Cross-attention between the towers."""

    layers: int | list[int] | BridgeStrategy = Field(default="shallow_focus", description="count, list, or strategy")
    directions: BridgeDirections = Field(default="both", description="both, one way, or none")
    zero_init: bool = Field(default=True, description="output projections start at zero")
    scale: float = Field(default=1.0, description="factor of both updates")


class AudioConfig(Section):
    """Audio cross-attention in the first layers of both towers."""

    dim: int = Field(gt=0, description="width of the audio features")
    width: int = Field(gt=0, description="width of the projected features")
    inner: int | None = Field(default=384, description="attention width; null for each tower's own width")
    heads: int = Field(gt=0, description="attention heads")
    layers: int = Field(ge=0, description="first layers that hear audio")
    context: int = Field(default=2, ge=0, le=4, description="50 Hz frames of context on each side; the look-ahead")


class ModelConfig(Section):
    """Everything that shapes the weights and the attention pattern."""

    preset: str
    video: TowerConfig
    struct: TowerConfig
    bridge: BridgeConfig
    audio: AudioConfig
    frames_per_chunk: int = Field(default=2, ge=1, description="latent frames denoised together")
    window: int | None = Field(default=None, ge=1, description="chunks a query sees, its own included; null for all")
    sink: int = Field(default=0, ge=0, description="first chunks always seen beside the window")

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.struct.layers > self.video.layers:
            raise ValueError(f"struct.layers {self.struct.layers}: expected at most video.layers {self.video.layers}")
        if self.audio.layers > self.struct.layers:
            raise ValueError(f"audio.layers {self.audio.layers}: expected at most struct.layers {self.struct.layers}")
        if self.video.in_dim < 2 * self.video.out_dim:
            raise ValueError(
                f"video.in_dim {self.video.in_dim}: expected at least {2 * self.video.out_dim}, "
                "the noisy and the reference latent"
            )
        for inner in (self.audio.inner or self.video.dim, self.audio.inner or self.struct.dim):
            if inner % self.audio.heads:
                raise ValueError(f"audio.heads {self.audio.heads}: expected a divisor of the attention width {inner}")
        return self

    @property
    def head_dims(self) -> dict[str, int]:
        """Head size of every attention by what sets it; kernels support some sizes only."""
        heard = {} if not self.audio.layers else {
            f"audio, {name}": (self.audio.inner or tower.dim) // self.audio.heads
            for name, tower in (("video", self.video), ("struct", self.struct))
        }  # fmt: skip
        return {"video": self.video.head_dim, "struct": self.struct.head_dim, **heard}


class ModelOverrides(Section):
    """What a run changes in its preset; absent keys keep the preset's value."""

    bridge_layers: int | list[int] | BridgeStrategy | None = None
    bridge_directions: BridgeDirections | None = None
    frames_per_chunk: int | None = Field(default=None, ge=1)
    window: int | None = Field(default=None, ge=1)
    sink: int | None = Field(default=None, ge=0)
    text: bool | None = None


class DataConfig(Section):
    """Which clips a run trains on, and how they are dealt out."""

    shards: str | list[str] = Field(
        default="shards",
        description="folder of a shard set (with manifest.json), or its URL; a list: one bucket of clips for each set",
    )
    cache: str | None = Field(
        default=None, description="folder on a disk of this machine for what is read of a set at a URL, which needs one"
    )
    cache_gib: float = Field(default=100.0, gt=0, description="GiB kept in data.cache at most")
    video_codec: str | None = Field(
        default=None, description="folder of the shards' video VAE, to decode sample frames; null: none are shown"
    )
    frames: PositiveInt | list[PositiveInt] = Field(
        default=9,
        description="latent frames of a training clip, 1 + k * frames_per_chunk with k >= 1; a list: for each set",
    )
    clips_per_step: int = Field(default=8, ge=1, description="clips of one optimizer step over all ranks")
    max_micro_batch: int = Field(default=8, ge=1, description="clips per forward on one data-parallel rank, at most")
    prefetch: int = Field(default=2, ge=1, description="steps read ahead")
    workers: int = Field(default=0, ge=0, description="processes of each rank that read; 0: a thread of the trainer")
    allow_new_shards: bool = Field(default=False, description="--resume may go on with another shard set")
    max_damaged: int = Field(
        default=0,
        ge=0,
        description="damaged clips, over all ranks since the run began, that are replaced; the next ends the run",
    )

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if not self.sets or not all(self.sets):
            raise ValueError(f"shards {json.dumps(self.shards)}: expected the name of at least one set, none empty")
        if isinstance(self.frames, list) and len(self.frames) != len(self.sets):
            raise ValueError(
                f"frames {json.dumps(self.frames)}: expected one number, or one for each of {len(self.sets)} sets"
            )
        return self

    @property
    def sets(self) -> tuple[str, ...]:
        """`shards` as a tuple."""
        return (self.shards,) if isinstance(self.shards, str) else tuple(self.shards)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Latent frames of a training clip of each set."""
        return tuple(self.frames) if isinstance(self.frames, list) else (self.frames,) * len(self.sets)


class NoiseConfig(Section):
    """Diffusion Forcing: how noise levels are drawn (model reference 5.2)."""

    shift_video: float = Field(default=3.0, gt=0)
    shift_struct: float = Field(default=1.0, gt=0)
    max_sigma_struct: float = Field(default=0.7, gt=0, le=1, description="upper end of the main part of sigma_s")
    p_above_max_struct: float = Field(default=0.2, ge=0, le=1, description="share drawn between that end and 1")
    p_clean_first: float = Field(default=0.8, ge=0, le=1, description="frame 0 is clean")
    p_clean_prefix: float = Field(default=0.5, ge=0, le=1, description="a random number of first chunks is clean")
    p_same: float = Field(default=0.1, ge=0, le=1, description="all noisy frames of a tower share one level")
    p_drop: float = Field(default=0.1, ge=0, le=1, description="each of audio, text and reference is dropped")
    sample_shift_struct: float = Field(default=0.5, gt=0, description="sampling: sigma_s = s u / (1 + (s-1) u)")


class LipSyncConfig(Section):
    """The lip-sync contrast (model reference 8.4)."""

    rows: tuple[float, float] = Field(default=(36 / 64, 60 / 64), description="mouth rows, shares of the latent height")
    cols: tuple[float, float] = Field(default=(18 / 64, 46 / 64), description="mouth columns, shares of its width")
    dim: int = Field(default=256, gt=0, description="width of the embeddings")
    tau: float = Field(default=0.07, gt=0, description="start of the learned temperature")
    max_sigma: float = Field(default=0.6, gt=0, le=1, description="noisier frames take no part")

    @field_validator("rows", "cols")
    @classmethod
    def _check(cls, span: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= span[0] < span[1] <= 1:
            raise ValueError("expected 0 <= start < stop <= 1")
        return span


class LossConfig(Section):
    """Weights of the losses beside that of the video velocity, which is 1 (model reference 8)."""

    struct: float = Field(default=0.5, ge=0)
    flame: float = Field(default=0.1, ge=0)
    flame_steps: int = Field(default=10_000, ge=1, description="the FLAME weight falls linearly to 0 over these steps")
    lip_sync: float = Field(default=0.3, ge=0)
    lip: LipSyncConfig = LipSyncConfig()


class ParallelConfig(Section):
    """How a clip is spread over ranks and memory."""

    sequence: int = Field(default=1, ge=1, description="ranks that share one clip")
    recompute: Literal["none", "selective", "full", "offload"] = Field(
        default="none",
        description="layers computed again in the backward: every second, or all; offload: all, inputs in host memory",
    )
    graphs: bool | None = Field(
        default=None,
        description="on a GPU, layers run as CUDA graphs; null: with the fused kernels, unless recompute is offload",
    )


class TrainConfig(Section):
    """Length, seed and intervals, in optimizer steps."""

    steps: int = Field(ge=1, description="optimizer steps, the length of the learning-rate schedule")
    stop_at: int | None = Field(default=None, ge=1, description="stop after this step with a checkpoint; null: the end")
    seed: int = Field(default=0, ge=0, lt=2**63)
    log_every: int = Field(default=10, ge=1)
    save_every: int = Field(default=500, ge=1)
    validate_every: int = Field(default=500, ge=1)
    validation_sigmas: int = Field(default=10, ge=1, description="fixed levels (k + 1/2) / n")
    validation_clips: int = Field(default=16, ge=1, description="held-out clips used, at most")
    image_every: int = Field(default=500, ge=1, description="steps between sample frames in TensorBoard")


class RunConfig(Section):
    """One training run."""

    preset: Literal["tiny", "small", "mova-lite", "mova-360p"]
    deepspeed: str = Field(description="DeepSpeed file, relative to the run file")
    kernels: Literal["auto", "reference", "fused", "flex"] = "auto"
    model: ModelOverrides = ModelOverrides()
    data: DataConfig = DataConfig()
    noise: NoiseConfig = NoiseConfig()
    loss: LossConfig = LossConfig()
    parallel: ParallelConfig = ParallelConfig()
    train: TrainConfig


SectionT = TypeVar("SectionT", bound=Section)


def validate(kind: type[SectionT], values: Mapping[str, Any], origin: str) -> SectionT:
    """Build `kind` from JSON values; a ConfigError names `origin`, the key, the value and what was expected."""
    try:
        return kind.model_validate_json(json.dumps(values))
    except ValidationError as error:
        raise ConfigError(f"{origin}: {describe(error, kind)}") from None
