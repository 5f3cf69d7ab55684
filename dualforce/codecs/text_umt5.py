"""Text embeddings of umT5 (arXiv 2304.09151), as Wan's transformers read them, from a folder as transformers writes it.

A caption is cleaned, cut to 512 tokens with the end token, and run through the encoder; what lies beyond the tokens is
zeros, which attention sees (model reference 2.3 and 9.2). Only true tokens are computed: the encoder would mask the
others, and its positions are relative. Of Wan's cleaning, ftfy is left out: it repairs wrongly decoded
characters, of which a file of UTF-8 has none, and also makes curly quotes straight, ligatures letters and wide letters
narrow, which texts must come with for the same tokens as Wan's.
"""

from __future__ import annotations

import hashlib
import html
import importlib
import logging
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from dualforce.codecs.protocols import CodecError
from dualforce.config_file import read_json

KIND, VERSION = "umt5", "v1"
TOKENS = 512
CONFIG, TOKENIZER, WEIGHTS, INDEX = (
    "config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json",
)  # fmt: skip

logger = logging.getLogger(__name__)


class Umt5Text:
    """Last hidden state of the encoder in a folder. The tag names width, weights and tokenizer."""

    def __init__(self, folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> None:
        """`folder`: of a model with its tokenizer.json, or of a pipeline with `text_encoder` and `tokenizer`. `dtype`:
        that of the network; None is bfloat16 on a GPU and float32 elsewhere.

        Raises ConfigError for a JSON file that cannot be read, CodecError for another model, files that are missing,
        damaged or of two models, and without transformers (extra `speech`).
        """
        model, tokenizer, config = _parts(folder)
        self._device = torch.device(device)
        dtype = dtype or (torch.bfloat16 if self._device.type == "cuda" else torch.float32)
        digest = _digest([*_weights(model), tokenizer / TOKENIZER])
        self._tokenizer = _load_tokenizer(tokenizer / TOKENIZER, config)
        self._model = _load_model(model, dtype).to(self._device).eval()
        self.width = int(self._model.config.d_model)
        self.tag = f"{KIND}-{self.width}-{digest[:12]}-{VERSION}"

    @torch.inference_mode()
    def encode(self, text: str) -> Tensor:
        """Embedding [n,width] fp32 on the CPU of the n <= 512 tokens of a text, the end token included. A longer text
        is cut, with a line in the log. Raises CodecError as `check_characters`."""
        check_characters(text)
        tokens = self._tokenizer.encode(clean(text))
        if tokens.overflowing:
            logger.warning("text cut to %d tokens: %.60s...", TOKENS, text)
        ids = torch.tensor([tokens.ids], device=self._device)
        hidden: Tensor = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
        return hidden.float().cpu()


def identify(folder: Path) -> tuple[str, int]:
    """(tag, width) of the encoder in a folder, from its files alone. Raises ConfigError and CodecError as `Umt5Text`
    does for files that are missing or of another model; damaged weights are not found."""
    model, tokenizer, config = _parts(folder)
    width = config.get("d_model")
    if type(width) is not int:
        raise CodecError(f"{model / CONFIG}: d_model = {width!r}: expected a number")
    digest = _digest([*_weights(model), tokenizer / TOKENIZER])
    return f"{KIND}-{width}-{digest[:12]}-{VERSION}", width


def clean(text: str) -> str:
    """HTML entities resolved, twice as Wan does, and every run of white space one blank, none at the ends."""
    return " ".join(html.unescape(html.unescape(text)).split())


def check_characters(text: str) -> None:
    """Raise CodecError for half of a character, as JSON and command lines may hold: tokenizers take none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CodecError(f"text: {text[error.start]!a} at {error.start}: expected whole characters") from None


def padded(embedding: Tensor) -> Tensor:
    """[n,Ct] -> [512,Ct], zeros beyond the text: the length that the model sees whatever the text."""
    return torch.nn.functional.pad(embedding, (0, 0, 0, TOKENS - len(embedding)))


def _parts(folder: Path) -> tuple[Path, Path, dict[str, Any]]:
    """Folders of the model and of its tokenizer, and the model's config."""
    model, tokenizer = folder, folder
    if not (folder / CONFIG).is_file() and (folder / "text_encoder").is_dir():
        model, tokenizer = folder / "text_encoder", folder / "tokenizer"
    config = read_json(model / CONFIG)
    if config.get("model_type") != KIND:
        raise CodecError(f"{model / CONFIG}: model_type = {config.get('model_type')!r}: expected {KIND!r}")
    if not (tokenizer / TOKENIZER).is_file():
        raise CodecError(f"{tokenizer}: no {TOKENIZER}: expected it there, or a folder with text_encoder and tokenizer")
    return model, tokenizer, config


def _weights(folder: Path) -> list[Path]:
    """The safetensors files of the model; CodecError where one is missing."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise CodecError(f"{folder}: no weights: expected {WEIGHTS}, or several files with {INDEX}")
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CodecError(f"{folder / INDEX}: weight_map: expected an object of file names")
    for name in sorted({str(name) for name in names.values()}):
        if PurePath(name).name != name or not (folder / name).is_file():
            raise CodecError(f"{folder / INDEX}: weight_map: {name!r}: expected a file in this folder")
    return [folder / name for name in sorted(set(names.values()))]


def _digest(files: list[Path]) -> str:
    """SHA-256 over the contents of files, one after the other."""
    whole = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _module(name: str, folder: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise CodecError(f"{folder}: needs transformers: install the extra `speech`, or build without texts") from None


def _load_tokenizer(path: Path, config: dict[str, Any]) -> Any:
    """The tokenizer of a tokenizer.json as it stands there; transformers would build it anew from its vocabulary."""
    tokenizers = _module("tokenizers", path.parent)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises this very class
        raise CodecError(f"{path}: {' '.join(str(error).split())[:200]}: expected a tokenizer") from None
    size, end = config.get("vocab_size"), config.get("eos_token_id", 1)
    if not isinstance(size, int) or tokenizer.get_vocab_size() > size:
        raise CodecError(f"{path}: {tokenizer.get_vocab_size()} tokens: expected at most vocab_size = {size!r}")
    tokenizer.no_padding()
    tokenizer.enable_truncation(TOKENS)
    if tokenizer.encode("a").ids[-1:] != [end]:
        raise CodecError(f"{path}: a text does not end with token {end}: expected the tokenizer of {KIND}")
    return tokenizer


def _load_model(folder: Path, dtype: torch.dtype) -> Any:
    """The encoder with all its weights. Nothing is fetched or run."""
    transformers = _module("transformers", folder)
    transformers.utils.logging.set_verbosity_error()  # missing weights are checked below
    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = transformers.UMT5EncoderModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # of any kind: what several readers make of a damaged or foreign file
        raise CodecError(f"{folder}: {' '.join(str(error).split())[:300]}: expected a {KIND} encoder") from None
    missing = sorted([*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])])
    if missing:  # they would be random numbers, under a tag that claims otherwise
        raise CodecError(f"{folder}: {missing[0]}: not in the weights ({len(missing)} such): expected a {KIND} encoder")
    return model
