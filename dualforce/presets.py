"""The four model sizes, and how a run turns one into a ModelConfig."""

from __future__ import annotations

from dataclasses import dataclass

from dualforce.config import AudioConfig, BridgeConfig, BridgeStrategy, ModelConfig, ModelOverrides, TowerConfig

LATENT_CHANNELS = 16
VIDEO_IN = 2 * LATENT_CHANNELS + 4  # noisy latent, mask of the known frame, reference latent


@dataclass(frozen=True)
class Preset:
    """(dim, heads, ffn, layers) of both towers, the bridge, and (layers, inner, width, heads) of the audio."""

    video: tuple[int, int, int, int]
    struct: tuple[int, int, int, int]
    bridge: int | BridgeStrategy
    audio: tuple[int, int | None, int, int]
    text_dim: int
    frames_per_chunk: int


PRESETS = {
    #                     dim heads    ffn layers    dim heads   ffn layers  bridge  audio                 text  chunk
    "tiny":      Preset((128,    4,   256,  4), (  64,    4,  128,   4),     2, ( 2, None,  128, 4),   64,  2),
    "small":     Preset((1024,   8,  4096, 12), ( 512,    4, 2048,  12),     4, ( 4,  384, 1024, 3), 4096,  2),
    "mova-lite": Preset((1536,  12,  8960, 20), ( 768,   12, 3072,  20),     6, ( 6,  384, 1536, 3), 4096,  2),
    "mova-360p": Preset((5120,  40, 13824, 40), (1536,   12, 8960,  30), "full", (10, 384, 1536, 3), 4096,  2),
}  # fmt: skip


def build_model_config(
    preset: str, *, struct_dim: int, audio_dim: int, overrides: ModelOverrides | None = None
) -> ModelConfig:
    """ModelConfig of a preset for a shard set with `struct_dim` motion and `audio_dim` audio features.

    Raises ValueError (pydantic's ValidationError) when the overrides do not fit the preset.
    """
    row = PRESETS[preset]
    change = overrides or ModelOverrides()
    text = True if change.text is None else change.text
    audio_layers, inner, width, audio_heads = row.audio
    return ModelConfig(
        preset=preset,
        video=_tower(row.video, VIDEO_IN, LATENT_CHANNELS, 2, row.text_dim, text),
        struct=_tower(row.struct, struct_dim, struct_dim, 1, row.text_dim, text),
        bridge=BridgeConfig(
            layers=row.bridge if change.bridge_layers is None else change.bridge_layers,
            directions=change.bridge_directions or "both",
        ),
        audio=AudioConfig(dim=audio_dim, width=width, inner=inner, heads=audio_heads, layers=audio_layers),
        frames_per_chunk=change.frames_per_chunk or row.frames_per_chunk,
        window=change.window,
        sink=change.sink or 0,
    )


def _tower(
    row: tuple[int, int, int, int], in_dim: int, out_dim: int, patch: int, text_dim: int, text: bool
) -> TowerConfig:
    dim, heads, ffn, layers = row
    return TowerConfig(
        dim=dim, heads=heads, ffn=ffn, layers=layers, in_dim=in_dim, out_dim=out_dim, patch=patch, text_dim=text_dim,
        text=text,
    )  # fmt: skip
