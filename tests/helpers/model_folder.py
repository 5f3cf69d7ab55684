"""A complete model folder around a small random model, with the extractors that need no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.random_model import random_model

from dualforce.codecs.audio_logmel import TAG as AUDIO_TAG
from dualforce.codecs.audio_logmel import WIDTH as AUDIO_WIDTH
from dualforce.codecs.video_dct import CHANNELS
from dualforce.codecs.video_dct import TAG as VIDEO_TAG
from dualforce.model.dual_tower import DualTower
from dualforce.weights.export import folder_config, write_model

SIZE = 32
MOTION_NAMES = ["pitch", "yaw", "roll", "mouth_open"]


def run_config(model: DualTower, size: int = SIZE, motion_tag: str = "rendered-head-v1") -> dict[str, Any]:
    """What a training run leaves in its config.json, as far as an export reads it."""
    names = MOTION_NAMES if model.config.struct.in_dim == len(MOTION_NAMES) else None
    latent = [CHANNELS, size // 8, size // 8]
    widths = {"struct": model.config.struct.in_dim, "audio": model.config.audio.dim}
    return {
        "run": {"noise": {"shift_video": 3.0, "sample_shift_struct": 0.5}},
        "model": model.config.model_dump(mode="json"),
        "extractors": {
            "video": {"tag": VIDEO_TAG, "channels": CHANNELS, "height": latent[1], "width": latent[2]},
            "motion": {"tag": motion_tag, "width": widths["struct"], **({"names": names} if names else {})},
            "audio": {"tag": AUDIO_TAG, "width": AUDIO_WIDTH, "hz": 50},
        },
        "statistics": {
            "video": {"mean": [[0.5] * CHANNELS, [-0.25] * CHANNELS], "std": [[0.7] * CHANNELS, [0.4] * CHANNELS]},
            **{name: {"mean": [0.1] * width, "std": [2.0] * width} for name, width in widths.items()},
        },
        "geometry": {"pixel_size": size, "latent": latent, "frames": 9},
    }


def write_model_folder(folder: Path, **changes: Any) -> DualTower:
    """Write a model folder (random weights, motion of four values, pictures of 32 x 32) and return its model."""
    model = random_model(len(MOTION_NAMES), AUDIO_WIDTH, seed=3)
    config = folder_config(run_config(model), "run/config.json") | changes
    write_model(folder, model.state_dict(), config)
    return model
