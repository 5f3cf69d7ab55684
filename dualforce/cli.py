"""The command line `dualforce`: one verb per capability. Training is started by a launcher (`dualforce.train`)."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.logging import RichHandler

from data_shards.schema import ShardError
from dualforce.codecs.media import MediaError
from dualforce.codecs.motion_sidecar import SidecarError
from dualforce.codecs.protocols import CodecError
from dualforce.config import ConfigError
from dualforce.data_commands import app as data_app
from dualforce.generate.inputs import GenerateError, Sources
from dualforce.generate.request import Sampling
from dualforce.generate.request import generate as generate_video
from dualforce.launch import keep_compiled_kernels
from dualforce.preprocess.errors import BuildError
from dualforce.preprocess.per_video import PerVideoError
from dualforce.weights.export import folder_config, tower_state, write_model
from dualforce.weights.keys import WeightsError
from dualforce.weights.load import load_model

# What a user can cause: each carries one line. Anything else is a defect and keeps its traceback.
USER_ERRORS = (
    BuildError, CodecError, ConfigError, GenerateError, MediaError, OSError, PerVideoError, ShardError, SidecarError,
    WeightsError,
)  # fmt: skip
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

DtypeName = Literal["float32", "bfloat16"]

logger = logging.getLogger(__name__)
app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="DualForce: causal, audio-driven talking-head diffusion.",
)  # fmt: skip
app.add_typer(data_app, name="data")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="folder of a training run (with config.json and checkpoints/)")],
    out: Annotated[Path, typer.Option("--out", help="model folder to write; must not exist or be empty")],
    step: Annotated[int | None, typer.Option(help="checkpoint of this step; default: the newest")] = None,
    dtype: Annotated[DtypeName, typer.Option(help="type of the stored weights")] = "float32",
) -> None:
    """Turn a checkpoint of a run into a model folder. Needs no GPU."""
    from dualforce.train.checkpoint import read_fp32_state, run_config  # imports DeepSpeed, which takes seconds

    config = folder_config(run_config(run, step), str(run))
    state = tower_state(read_fp32_state(run, step))
    write_model(out, state, config, dtype=DTYPES[dtype], progress=True)
    logger.info("model written to %s", out)


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="model folder")],
    image: Annotated[Path, typer.Option(help="picture of the face (or a video: its first picture)")],
    audio: Annotated[Path, typer.Option(help="sound that drives the face: any sound or video file")],
    out: Annotated[Path, typer.Option(help="mp4 to write")],
    seconds: Annotated[float | None, typer.Option(help="length; default: that of the sound")] = None,
    steps: Annotated[int, typer.Option(help="denoising steps per chunk")] = 20,
    seed: Annotated[int, typer.Option(help="seed of the noise")] = 0,
    text: Annotated[str | None, typer.Option(help="what the video shows, in words; needs --text-encoder")] = None,
    text_encoder: Annotated[
        Path | None, typer.Option(help="folder of the text encoder that the model was trained with")
    ] = None,
    text_embedding: Annotated[Path | None, typer.Option(help='safetensors file with "text" [E,Ct]')] = None,
    cfg_text: Annotated[float, typer.Option(help="guidance scale of the text; 1 is none")] = 1.0,
    cfg_audio: Annotated[float, typer.Option(help="guidance scale of the sound; 1 is none")] = 1.0,
    motion: Annotated[
        Path | None, typer.Option(help="motion file: one row for frame 0, more rows drive the whole clip")
    ] = None,
    mode: Annotated[Literal["ar", "pyramid"], typer.Option(help="one chunk at a time, or several in flight")] = "ar",
    lag: Annotated[int, typer.Option(help="pyramid: steps by which a chunk is ahead of the next")] = 1,
    horizon: Annotated[int, typer.Option(help="pyramid: chunks in flight, at most")] = 4,
    window: Annotated[
        int | None, typer.Option(help="chunks a chunk sees, its own included; default: the model's")
    ] = None,
    face_landmarker: Annotated[Path | None, typer.Option(help="MediaPipe's face_landmarker.task")] = None,
    audio_encoder: Annotated[
        Path | None, typer.Option(help="folder of the speech encoder that the model was trained with")
    ] = None,
    motion_extractor: Annotated[
        Path | None, typer.Option(help="LivePortrait checkpoint that the model was trained with")
    ] = None,
    video_codec: Annotated[
        Path | None, typer.Option(help="folder of the video VAE that the model was trained with")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="edge of the pictures in pixels, one of those trained at; default: the first")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    dtype: Annotated[DtypeName | None, typer.Option(help="default: bfloat16 on a GPU, float32 elsewhere")] = None,
) -> None:
    """Generate a talking video from a model folder, a picture and a sound."""
    place = _device(device)
    kind = DTYPES[dtype] if dtype else (torch.bfloat16 if place.type == "cuda" else torch.float32)
    sources = Sources(
        image, audio, motion, text_embedding, face_landmarker, seconds, audio_encoder, motion_extractor, video_codec,
        text, text_encoder, size,
    )  # fmt: skip
    sampling = Sampling(steps, seed, cfg_text, cfg_audio, mode, lag, horizon, window)
    keep_compiled_kernels()
    loaded = load_model(model, place, kind)
    origin = str(model / "config.json")
    count = generate_video(loaded.model, loaded.config, loaded.model.kernels, sources, sampling, out, origin)
    logger.info("%d pictures written to %s", count, out)


def main() -> None:
    """Entry point of the console script: exit code 2 and one line for anything a user can cause."""
    console = Console(stderr=True)
    handler = RichHandler(console=console, show_path=False, show_level=False, show_time=False)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    try:
        app()
    except USER_ERRORS as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise GenerateError(f"--device {name}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise GenerateError(f"--device {name}: no CUDA GPU is available here: expected cpu")
    return device


if __name__ == "__main__":
    main()
