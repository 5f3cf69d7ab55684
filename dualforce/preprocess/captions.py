"""What is said of each video in words, embedded before the work is dealt out: no worker could hold the encoder too."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from dualforce.codecs.protocols import TextEncoder
from dualforce.codecs.text_umt5 import clean, padded
from dualforce.preprocess.features import Extracted
from dualforce.preprocess.per_video import PerVideoError, read_per_video


class CaptionError(PerVideoError):
    """A file of captions that cannot be used; one line for the user."""


class Caption(NamedTuple):
    """The cleaned text of a video, and the file that holds its embedding, made by the extractor `tag`."""

    text: str
    tag: str
    embedding: Path


def read_captions(path: Path, sources: Iterable[str]) -> dict[str, str]:
    """Caption of every one of `sources`, from a file as `read_per_video` reads it.

    Raises ConfigError for a file that is no JSON object, CaptionError for a video that it does not name, or whose
    caption is not a text: with captions in a set, each of its videos has one.
    """
    return read_per_video(path, sources, "--captions", "a text", CaptionError)


def embed_captions(
    captions: Mapping[str, str], encoder: TextEncoder, folder: Path, track: Callable[[list[str]], Iterable[str]] = iter
) -> dict[str, Caption]:
    """Captions by video, each different text embedded once, alone, into a file in `folder`. `track` passes the texts on
    as they are done. Raises CaptionError for a text whose embedding is not finite in float16."""
    cleaned = {source: clean(text) for source, text in captions.items()}
    names = {text: hashlib.sha256(text.encode()).hexdigest()[:32] for text in cleaned.values()}
    files = {text: folder / f"text-{name}.safetensors" for text, name in names.items()}
    for text in track(sorted(files)):
        embedding = encoder.encode(text).half()
        if not bool(torch.isfinite(embedding).all()):
            raise CaptionError(f"--captions: {text[:60]!r}: {encoder.tag} gave NaN or infinity: expected finite values")
        files[text].write_bytes(save({"text": embedding}))  # raises OSError on a full disk, which save_file does not
    return {source: Caption(text, encoder.tag, files[text]) for source, text in cleaned.items()}


def caption_embedding(caption: Caption) -> Extracted:
    """Text [512,Ct] float16 of a video, zeros beyond its tokens."""
    text: Tensor = load_file(caption.embedding)["text"]
    return Extracted(caption.tag, padded(text))
