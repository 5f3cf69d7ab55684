"""umT5 embeddings: what transformers computes, of the weights and the tokenizer that the tag names."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_umt5 import write_umt5
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dualforce.codecs import text_umt5
from dualforce.codecs.protocols import CodecError
from dualforce.codecs.registry import text_encoder, text_encoder_in
from dualforce.codecs.text_umt5 import TOKENS, Umt5Text, clean, padded
from dualforce.config import ConfigError

transformers = pytest.importorskip("transformers")
TEXT = "a man laughs and looks at the camera, grey wall"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_umt5(tmp_path_factory.mktemp("umt5") / "whole")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Umt5Text:
    return Umt5Text(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a\tman \n\n speaks ", "a man speaks"),
        ("you &amp; me", "you & me"),
        ("you &amp;amp; me", "you & me"),
        ("&amp;amp;amp;", "&amp;"),
        ("a&nbsp;b", "a b"),
        ("", ""),
    ],
)
def test_cleaning(text: str, expected: str) -> None:
    assert clean(text) == expected


@given(st.text())
def test_clean_text_has_no_white_space_but_single_blanks(text: str) -> None:
    found = clean(text)
    assert found == found.strip() and "  " not in found
    assert not any(character.isspace() for character in found if character != " ")


def test_embeddings_are_what_transformers_computes_with_padding(folder: Path, encoder: Umt5Text) -> None:
    """As Wan's pipeline does: padded to 512 tokens with a mask, and what lies beyond the text set to zero."""
    tokens = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )(TEXT, padding="max_length", max_length=512, truncation=True, return_tensors="pt")
    length = int(tokens.attention_mask.sum())
    model = transformers.UMT5EncoderModel.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state[0]
    hidden[length:] = 0
    found = encoder.encode(TEXT)
    assert found.shape == (length, 64) == (length, encoder.width) and found.dtype == torch.float32
    assert int(tokens.input_ids[0, length - 1]) == 1
    # fp32 sums over 512 keys, all but a few of them masked, and over those few alone; values of order 1.
    torch.testing.assert_close(padded(found), hidden, rtol=1e-4, atol=1e-5)
    assert found.std() > 0.1 and not torch.allclose(found[0], encoder.encode(TEXT + " speaks")[0], atol=1e-3)


def test_padding_adds_zeros_up_to_the_length_of_the_model() -> None:
    text = torch.randn(3, 5)
    assert padded(text).shape == (TOKENS, 5) and torch.equal(padded(text)[:3], text) and not padded(text)[3:].any()


def test_a_long_text_is_cut_and_said(encoder: Umt5Text, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    found = encoder.encode("a " * (TOKENS - 1))
    assert len(found) == TOKENS and not caplog.records
    again = encoder.encode("a " * (TOKENS + 90))
    assert torch.equal(found, again) and len(caplog.records) == 1 and "cut to 512 tokens" in caplog.text


def test_half_of_a_character_is_one_line(encoder: Umt5Text) -> None:
    """As a command line in another encoding gives it."""
    with pytest.raises(CodecError, match=r"^text: '\\udce4' at 2: expected whole characters$"):
        encoder.encode("a \udce4")


def test_the_tag_names_weights_and_tokenizer(folder: Path, encoder: Umt5Text, tmp_path: Path) -> None:
    other = Umt5Text(write_umt5(tmp_path / "other", seed=5)).tag
    assert encoder.tag.startswith("umt5-64-") and encoder.tag.endswith("-v1") and encoder.tag != other
    assert text_encoder(encoder.tag, folder).tag == text_encoder_in(folder).tag == encoder.tag
    with pytest.raises(CodecError, match=f"other: is '{other}': expected '{encoder.tag}'"):
        text_encoder(encoder.tag, tmp_path / "other")
    with pytest.raises(CodecError, match="'t5-64-x-v1': unknown; expected that of a umt5 model"):
        text_encoder("t5-64-x-v1", folder)
    shutil.copytree(folder, tmp_path / "words")
    path = tmp_path / "words" / "tokenizer.json"
    path.write_text(path.read_text().replace("▁laughs", "▁cries"))
    assert Umt5Text(tmp_path / "words").tag != encoder.tag


def test_a_pipeline_with_several_files_of_weights(encoder: Umt5Text, tmp_path: Path) -> None:
    """As the published weights come: `text_encoder` with an index and `tokenizer`."""
    write_umt5(tmp_path / "p", pipeline=True, max_shard_size="40KB")
    files = sorted(path.name for path in (tmp_path / "p" / "text_encoder").glob("*.safetensors"))
    assert len(files) > 1
    parts = Umt5Text(tmp_path / "p")
    assert torch.equal(parts.encode(TEXT), encoder.encode(TEXT))
    last = tmp_path / "p" / "text_encoder" / files[-1]
    save_file({name: value + 1 for name, value in load_file(last).items()}, last, metadata={"format": "pt"})
    assert Umt5Text(tmp_path / "p").tag != parts.tag
    last.unlink()
    with pytest.raises(CodecError, match=f"weight_map: '{files[-1]}': expected a file in this folder"):
        Umt5Text(tmp_path / "p")


def test_padding_that_a_tokenizer_asks_for_is_left_out(folder: Path, encoder: Umt5Text, tmp_path: Path) -> None:
    """tokenizer.json may say so, and the length to cut to."""
    from tokenizers import Tokenizer

    shutil.copytree(folder, tmp_path / "padding")
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.enable_padding(length=32)
    made.enable_truncation(4)
    made.save(str(tmp_path / "padding" / "tokenizer.json"))
    assert torch.equal(Umt5Text(tmp_path / "padding").encode(TEXT), encoder.encode(TEXT))


def test_bfloat16_is_close(folder: Path, encoder: Umt5Text) -> None:
    a, b = encoder.encode(TEXT), Umt5Text(folder, dtype=torch.bfloat16).encode(TEXT)
    assert b.dtype == torch.float32 and 0 < (a - b).norm() / a.norm() < 0.05


def broken(folder: Path, to: Path, case: str) -> Path:
    shutil.copytree(folder, to)
    config, weights, words = to / "config.json", to / "model.safetensors", to / "tokenizer.json"
    changes: dict[str, Any] = {
        "kind": {"model_type": "t5"},
        "layers": {"num_layers": 3},
        "vocabulary": {"vocab_size": 9},
    }
    if case in changes:
        config.write_text(json.dumps(json.loads(config.read_text()) | changes[case]))
    elif case == "config":
        config.write_text("[1]")
    elif case == "weights":
        weights.rename(to / "pytorch_model.bin")
    elif case == "damaged":
        weights.write_bytes(b"\xff" * 100)
    elif case == "outside":
        weights.rename(to.parent / "elsewhere.safetensors")
        index = {"weight_map": {"shared.weight": "../elsewhere.safetensors"}}
        (to / "model.safetensors.index.json").write_text(json.dumps(index))
    elif case == "no tokenizer":
        words.unlink()
    elif case == "words":
        words.write_text("{}")
    elif case == "no end":
        words.write_text(json.dumps(json.loads(words.read_text()) | {"post_processor": None}))
    return to


CASES = [
    ("kind", r"model_type = 't5': expected 'umt5'"),
    ("layers", r"encoder.block.2.* not in the weights \(\d+ such\)"),
    ("vocabulary", r"tokens: expected at most vocab_size = 9"),
    ("config", r"config.json: expected a JSON object, found list"),
    ("weights", r"no weights: expected model.safetensors, or several"),
    ("damaged", r"expected a umt5 encoder"),
    ("outside", r"weight_map: '../elsewhere.safetensors': expected a file in this folder"),
    ("no tokenizer", r"no tokenizer.json: expected it there, or a folder with text_encoder and tokenizer"),
    ("words", r"tokenizer.json: .*: expected a tokenizer"),
    ("no end", r"a text does not end with token 1"),
]


@pytest.mark.parametrize(("case", "named"), CASES, ids=[case for case, _ in CASES])
def test_another_folder_is_one_line(folder: Path, tmp_path: Path, case: str, named: str) -> None:
    with pytest.raises((CodecError, ConfigError), match=named) as caught:
        Umt5Text(broken(folder, tmp_path / "folder", case))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_without_transformers_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(text_umt5.importlib, "import_module", absent)
    with pytest.raises(CodecError, match="install the extra `speech`"):
        Umt5Text(folder)
