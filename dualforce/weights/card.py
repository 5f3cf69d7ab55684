"""The README.md card of a model folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from dualforce.codecs.provenance import origin_of

CARD = """# DualForce model

Causal, audio-driven talking-head diffusion: a video tower and a structure tower (face motion) joined by a bridge,
trained by Diffusion Forcing. It turns one image of a face and a sound into a video of that face speaking, chunk by
chunk, of any length.

| | |
|---|---|
| preset | `{preset}` |
| parameters | {parameters:,} ({dtype}) |
| pictures | {size}, {fps} frames a second |
| training clips | {frames}, {chunk} per chunk after the first |
| bridge | layers `{bridge}`, directions `{directions}` |

## Use

    dualforce generate THIS_FOLDER --image face.png --audio speech.wav --out talking.mp4

or, in Python, `dualforce.weights.load.load_model(folder, device, dtype)`. The weights are plain safetensors: the towers
carry the names of Wan's transformer behind `video_dit.` and `struct_dit.`, the bridge is under `dual_tower_bridge.`.
`config.json` holds the model's shape, the extractors, and the statistics that its inputs are normalised with.

## Extractors

Inputs must come from exactly these extractors; another tag is another model input.

{extractors}

The licence of these weights follows from the licences of the clips they were trained on, which this card cannot know.

## Files

| file | sha256 |
|---|---|
{files}
"""


def model_card(config: Mapping[str, Any], hashes: Mapping[str, str], parameters: int, dtype: torch.dtype) -> str:
    """Text of the card for a model folder's config, with the sha256 of its files."""
    model, geometry = config["model"], config["geometry"]
    buckets = geometry.get("buckets") or [geometry]  # without: of a run of an earlier version
    sizes = [(bucket["pixel_size"], bucket["frames"]) for bucket in buckets]
    return CARD.format(
        preset=model["preset"],
        parameters=parameters,
        dtype=str(dtype).removeprefix("torch."),
        size=_either(f"{edge} x {edge}" for edge, _ in sizes) + " pixels",
        fps=25,
        frames=_either(str(frames) for _, frames in sizes) + " latent frames",
        chunk=model["frames_per_chunk"],
        bridge=model["bridge"]["layers"],
        directions=model["bridge"]["directions"],
        extractors="\n".join(_extractor_line(name, row["tag"]) for name, row in config["extractors"].items()),
        files="\n".join(f"| `{name}` | `{digest}` |" for name, digest in sorted(hashes.items())),
    )


def _either(words: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(words))


def _extractor_line(stream: str, tag: str) -> str:
    return f"- {stream}: `{tag}`: {origin_of(tag)}"
