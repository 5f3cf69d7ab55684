"""What is said of each video in words, embedded before the work is dealt out: no worker could hold the encoder too."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from data_shards.files import publish
from dualforce.codecs.protocols import CodecError, TextEncoder
from dualforce.codecs.text_umt5 import check_characters, clean, padded
from dualforce.preprocess.features import Extracted
from dualforce.preprocess.per_video import PerVideoError, read_per_video

MAX_CAPTION = 10_000  # characters; the encoder reads 512 tokens


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
    caption is not a text, has half of a character, or is longer than MAX_CAPTION: with captions in a set, each of its
    videos has one.
    """
    found = read_per_video(path, sources, "--captions", "a text", MAX_CAPTION, CaptionError)
    for source, text in found.items():
        try:
            check_characters(text)
        except CodecError as error:
            raise CaptionError(f"--captions {path}: {str(PurePosixPath(source).with_suffix(''))!r}: {error}") from None
    return found


def embed_captions(
    captions: Mapping[str, str],
    tag: str,
    load: Callable[[], TextEncoder],
    folder: Path,
    around: str = "",
    track: Callable[[list[str]], Iterable[str]] = iter,
) -> dict[str, Caption]:
    """Captions by video, each different text embedded once, alone, into a file in `folder`, by the encoder `tag`.

    A text that an earlier build embedded there is taken from its file, whose name is a hash of the text, the tag and
    `around`, which stands for all else that embeddings depend on. `load` is called where there is one without.
    `track` passes these on as they are done. Raises CaptionError for a text whose embedding is not finite in float16,
    and where the encoder has another tag.
    """
    cleaned = {source: clean(text) for source, text in captions.items()}
    files = {text: folder / _file_of(text, tag, around) for text in cleaned.values()}
    missing = [text for text in sorted(files) if not _is_whole(files[text])]
    if missing:
        encoder = load()
        if encoder.tag != tag:
            raise CaptionError(f"--text-encoder: is {encoder.tag!r}: expected {tag!r}, as when the build began")
        for text in track(missing):
            _embed(text, encoder, files[text])
    return {source: Caption(text, tag, files[text]) for source, text in cleaned.items()}


def _embed(text: str, encoder: TextEncoder, path: Path) -> None:
    embedding = encoder.encode(text).half()
    if not bool(torch.isfinite(embedding).all()):
        raise CaptionError(f"--captions: {text[:60]!r}: {encoder.tag} gave NaN or infinity: expected finite values")
    publish(path, save({"text": embedding}, metadata={"crc32": _checksum(embedding)}))


def _file_of(text: str, tag: str, around: str) -> str:
    whole = json.dumps([text, tag, around]).encode()
    return f"text-{hashlib.sha256(whole).hexdigest()[:32]}.safetensors"


def _is_whole(path: Path) -> bool:
    """Whether a file is there and holds what was written to it."""
    try:
        with safe_open(path, "pt") as file:
            return bool((file.metadata() or {}).get("crc32") == _checksum(file.get_tensor("text")))
    except (OSError, SafetensorError):
        return False


def _checksum(embedding: Tensor) -> str:
    return str(zlib.crc32(embedding.contiguous().numpy().tobytes()))


def caption_embedding(caption: Caption) -> Extracted:
    """Text [512,Ct] float16 of a video, zeros beyond its tokens."""
    text: Tensor = load_file(caption.embedding)["text"]
    return Extracted(caption.tag, padded(text))
