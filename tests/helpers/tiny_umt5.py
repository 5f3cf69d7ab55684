"""A umT5 encoder with random weights and a tokenizer of a few words, written in the published layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = ("a", "man", "woman", "person", "speaks", "laughs", "looks", "at", "the", "camera", "grey", "wall", "and")


def write_umt5(folder: Path, seed: int = 0, width: int = 64, pipeline: bool = False, **saving: Any) -> Path:
    """Model and tokenizer.json in `folder`, or as a pipeline has them: in `text_encoder` and `tokenizer`."""
    import transformers

    config = transformers.UMT5Config(
        vocab_size=128, d_model=width, d_kv=8, d_ff=96, num_layers=2, num_decoder_layers=0, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.UMT5EncoderModel(config)
        for parameter in model.parameters():  # as initialised, attention is all but even
            parameter.data.normal_(std=0.3)
    places = (folder / "text_encoder", folder / "tokenizer") if pipeline else (folder, folder)
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(places[0], **saving)
    tokenizer().save(str(places[1] / "tokenizer.json"))
    return folder


def tokenizer() -> Any:
    """Unigram over words and letters as SentencePiece has it: <pad> 0, </s> 1, <unk> 2, and the end token added."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [f"▁{word}" for word in WORDS] + ["▁", *letters, "&", ".", ","]
    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        *((piece, -2.0 - n / 50) for n, piece in enumerate(pieces)),
    ]
    made = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return made
