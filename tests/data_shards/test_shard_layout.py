"""A layout is the header of a safetensors file whose tensors are those of a clip and fill it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from helpers.fake_shards import fake_extractors, fake_sample
from safetensors.torch import save

from data_shards.layout import checksums, header_text, parse_layout, row_of
from data_shards.manifest import read_layouts
from data_shards.schema import ShardError

EXTRACTORS = fake_extractors(flame=True, text_dim=5)
PAYLOAD = save(fake_sample("k", "id", EXTRACTORS, frames=3).tensors())
TEXT = header_text(PAYLOAD, "here")


def test_a_layout_places_every_tensor() -> None:
    layout = parse_layout(TEXT, EXTRACTORS, "here")
    assert layout.size == len(PAYLOAD) and PAYLOAD.startswith(layout.header) and layout.text == TEXT
    assert (layout.frames, layout.tokens, layout.words) == (3, 3, 1 + 6 * 3 + 2)
    header = json.loads(TEXT)
    for part in layout.parts:
        assert [part.offset, part.offset + part.size] == header[part.name]["data_offsets"]
        assert list(part.shape) == header[part.name]["shape"] and part.stride * part.frames == part.size
    words = sorted(word for part in layout.parts for word in range(part.word, part.word + part.frames))
    assert words == list(range(1, layout.words))


def test_a_row_has_the_checksums_in_the_order_of_the_fields() -> None:
    layout = parse_layout(TEXT, EXTRACTORS, "here")
    row, parts = row_of(b"record", PAYLOAD, layout), {part.name: part for part in layout.parts}
    assert row[0] == checksums(b"record", 1)[0] and len(row) == layout.words
    assert [parts[name].word for name in ("video", "reference", "struct", "audio", "voiced")] == [1, 4, 5, 8, 11]
    video = PAYLOAD[len(layout.header) + parts["video"].offset :][: parts["video"].size]
    assert row[1:4] == [checksums(video[i * len(video) // 3 : (i + 1) * len(video) // 3], 1)[0] for i in range(3)]


def moved(header: dict[str, Any], by: int, behind: int = 0) -> None:
    for entry in header.values():
        entry["data_offsets"] = [x + by if entry["data_offsets"][0] >= behind else x for x in entry["data_offsets"]]


def unaligned(header: dict[str, Any]) -> None:
    moved(header, 3)
    size = header["voiced"]["data_offsets"][1] - header["voiced"]["data_offsets"][0]
    header["voiced"]["data_offsets"] = [0, size]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda h: moved(h, 8), "data_offsets from 8: expected 0, in sequence"),
        (lambda h: moved(h, 8, h["video"]["data_offsets"][0]), "in sequence"),
        (lambda h: h["struct"].update(data_offsets=[x + 8 for x in h["struct"]["data_offsets"]]), "in sequence"),
        (unaligned, "in sequence, a multiple of the size of a number"),
        (
            lambda h: h["video"]["data_offsets"].__setitem__(1, h["video"]["data_offsets"][1] + 2),
            "1538 bytes: expected",
        ),
        (lambda h: h["video"].update(shape=[3, 16, 4, 5]), "1536 bytes: expected 1920, of F16"),
        (lambda h: h["video"].update(dtype="BF16"), "reference: dtype float16: expected bfloat16"),
        (lambda h: h["video"].update(dtype="F8"), "dtype 'F8': expected one of"),
        (lambda h: h["video"].update(shape=[3, 16, 2, 8]), "video: shape [3, 16, 2, 8]: expected [3, 16, 4, 4]"),
        (lambda h: h["video"].update(data_offsets=[8, 8]), "expected a range of bytes"),
        (lambda h: h["video"].update(data_offsets=[0.0, 8.0]), "expected a range of bytes"),
        (lambda h: h["video"].update(shape=[]), "expected 1 to 8 lengths of at least 1"),
        (lambda h: h.pop("flame"), "in sequence"),
        (lambda h: h.update(evil=h.pop("flame")), "evil: unknown tensor"),
        (lambda h: h.update(text=7), "text: dtype None"),
    ],
)
def test_other_headers_are_refused(change: Callable[[dict[str, Any]], Any], named: str) -> None:
    header = json.loads(TEXT)
    change(header)
    with pytest.raises(ShardError) as caught:
        parse_layout(json.dumps(header), EXTRACTORS, "manifest.json: layouts[0]")
    assert str(caught.value).startswith("manifest.json: layouts[0]: ") and named in str(caught.value)


@pytest.mark.parametrize("value", [None, 7, "", "x" * 2**15, "\u00e4" * 9, "[]", "{", '{"a":1,"a":1}'])
def test_what_is_no_header(value: Any) -> None:
    with pytest.raises(ShardError, match=r"^here: .*expected"):
        parse_layout(value, EXTRACTORS, "here")


def test_a_clip_larger_than_readers_accept() -> None:
    extractors = fake_extractors(height=1024, width=1024)
    text = header_text(save(fake_sample("k", "id", fake_extractors(), frames=3).tensors()), "here")
    header = json.loads(text)
    start, size = header["video"]["data_offsets"][0], 3 * 16 * 1024 * 1024 * 2
    moved(header, size - 1536, start + 1)
    header["video"] = {"dtype": "F16", "shape": [3, 16, 1024, 1024], "data_offsets": [start, start + size]}
    with pytest.raises(ShardError, match=r"here: \d+ bytes: expected at most 67108864 of a clip"):
        parse_layout(json.dumps(header), extractors, "here")


def test_layouts_of_a_set_agree_in_their_tokens() -> None:
    other = header_text(save(fake_sample("k", "id", EXTRACTORS, frames=3, text_tokens=4).tensors()), "here")
    manifest = {"extractors": EXTRACTORS, "frames": 3, "layouts": [TEXT, other]}
    with pytest.raises(ShardError, match=r"here: layouts\[1\]: text: 4 tokens: expected 3, as in layouts\[0\]"):
        read_layouts(manifest, "here")
