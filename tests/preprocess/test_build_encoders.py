"""Building with pretrained encoders from folders: random weights in the published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.clips import sidecar_json, textured, tone, write_sidecar
from helpers.set_files import set_bytes
from helpers.tiny_umt5 import write_umt5
from helpers.wan_vae import write_wan_vae

from data_shards.reader import ShardSet
from data_shards.schema import ClipSample
from dualforce.codecs.media import write_video
from dualforce.codecs.protocols import CodecError
from dualforce.codecs.text_umt5 import Umt5Text
from dualforce.codecs.video_wan import WanVideoCodec
from dualforce.preprocess.build import BuildError, BuildOptions, BuildReport, build_shards
from dualforce.preprocess.captions import CaptionError, caption_embedding, embed_captions


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a (two windows) and b."""
    folder = tmp_path_factory.mktemp("clips")
    for name, frames, seed in (("a", 170, 1), ("b", 85, 2)):
        write_video(folder / f"{name}.mp4", textured(frames, seed=seed), tone(frames + 2, 0.3))
        write_sidecar(folder / f"{name}.mp4", sidecar_json(frames, identity=f"person {name}"))
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers")
    return write_wan_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def built(clips: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildReport, Path]:
    out = tmp_path_factory.mktemp("built") / "out"
    return build_shards(clips, out, BuildOptions(size=32, video_codec=vae)), out


def samples(root: Path, *splits: str) -> list[ClipSample]:
    opened = [ShardSet.open(root).split(name) for name in splits]
    return [split.read(index) for split in opened for index in range(len(split))]


def test_latents_of_a_video_vae(built: tuple[BuildReport, Path], vae: Path) -> None:
    """With a tag of their own and the reference the first of them; not normalised."""
    report, out = built
    tag = WanVideoCodec(vae).tag
    assert report.manifest["extractors"]["video"] == {"tag": tag, "channels": 16, "height": 4, "width": 4}
    found = samples(out, "train", "validation")
    assert len(found) == 3 and report.manifest["rejected"] == []
    for sample in found:
        assert sample.video.shape == (21, 16, 4, 4) and sample.video.dtype == torch.float16
        assert torch.equal(sample.reference, sample.video[0])
        assert sample.meta["tags"]["video"] == tag and sample.meta["coded"] == {"dtype": "float32", "tiled": False}
    train = torch.stack([sample.video for sample in samples(out, "train")]).double()
    mean = torch.tensor(report.manifest["statistics"]["video"]["mean"], dtype=torch.float64)
    wanted = torch.stack([train[:, :1].mean((0, 1, 3, 4)), train[:, 1:].mean((0, 1, 3, 4))])
    torch.testing.assert_close(mean, wanted, rtol=1e-4, atol=1e-5)
    assert mean.abs().max() > 0.1


@pytest.mark.slow
def test_latents_of_a_video_vae_do_not_depend_on_the_workers(
    built: tuple[BuildReport, Path], clips: Path, vae: Path, tmp_path: Path
) -> None:
    _, out = built
    build_shards(clips, tmp_path / "two", BuildOptions(size=32, workers=2, video_codec=vae))
    one, two = set_bytes(out), set_bytes(tmp_path / "two")
    assert one.keys() == two.keys()
    assert not [name for name in one if one[name] != two[name]]


def test_a_folder_without_vae_is_one_line(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CodecError, match=r"_class_name = None: expected 'AutoencoderKLWan'"):
        build_shards(clips, tmp_path / "out", BuildOptions(size=32, video_codec=tmp_path))
    assert not list((tmp_path / "out").glob("*.tar"))


CAPTIONS = {"a": "a man &amp; a woman speak", "b": "a  woman laughs", "never": "filmed"}


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    (tmp_path / "captions.json").write_text(json.dumps(CAPTIONS))
    return tmp_path / "captions.json"


def test_texts_of_a_file_are_embedded(clips: Path, captions: Path, tmp_path: Path) -> None:
    """Cleaned, in every window of the video, padded with zeros to one length, with a tag and width of their own."""
    pytest.importorskip("transformers")
    folder = write_umt5(tmp_path / "umt5")
    options = BuildOptions(size=32, captions=captions, text_encoder=folder)
    manifest = build_shards(clips, tmp_path / "out", options).manifest
    encoder = Umt5Text(folder)
    assert manifest["extractors"]["text"] == {"tag": encoder.tag, "width": 64}
    found = samples(tmp_path / "out", "train", "validation")
    assert len(found) == 3
    for sample in found:
        text = {"person a": "a man & a woman speak", "person b": "a woman laughs"}[sample.identity]
        assert sample.meta["caption"] == text and sample.meta["tags"]["text"] == encoder.tag
        wanted = encoder.encode(text)
        assert sample.text is not None and sample.text.shape == (512, 64) and sample.text.dtype == torch.float16
        assert torch.equal(sample.text[: len(wanted)], wanted.half()) and not sample.text[len(wanted) :].any()
    assert not list((tmp_path / "out").glob(".*"))


def test_a_later_build_loads_no_text_encoder_for_known_texts(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"a": "one", "b": "two"}))
    folder, kept = write_umt5(tmp_path / "umt5"), tmp_path / "kept"
    options = BuildOptions(size=32, captions=tmp_path / "c.json", text_encoder=folder, work=kept)
    first = build_shards(clips, tmp_path / "first", options)
    monkeypatch.setattr("dualforce.preprocess.plan.text_encoder_in", pytest.fail)
    second = build_shards(clips, tmp_path / "second", options)
    assert second.earlier == second.used == first.used > 0
    for tar in (tmp_path / "first").glob("*.tar"):
        assert (tmp_path / "second" / tar.name).read_bytes() == tar.read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": "x"}, "--captions .*: 'b' is missing: expected an entry for each video"),
        ({}, "--captions .*: 'a' and 1 more are missing"),
        ({"a": "x", "b": " "}, "'b': ' ': expected a text"),
        ({"a": "x", "b": 3}, "'b': 3: expected a text"),
        ({"a": "x", "b": [3] * 999}, "'b': list of 999: expected a text"),
        ({"a": "x", "b": "y\ud83d"}, r"--captions .*: 'b': text: '\\ud83d' at 1: expected whole characters"),
        ({"a": "x", "b": "y" * 10_001}, "--captions .*: 'b': 10001 characters: expected at most 10000"),
    ],
)
def test_a_video_without_caption_is_one_line(clips: Path, tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(CaptionError, match=message) as caught:
        build_shards(clips, tmp_path / "out", BuildOptions(captions=tmp_path / "c.json", text_encoder=tmp_path))
    assert "\n" not in str(caught.value) and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BuildOptions(captions=Path("c.json")), "--captions c.json: needs --text-encoder DIR"),
        (BuildOptions(text_encoder=Path("umt5")), "--text-encoder umt5: needs --captions FILE"),
    ],
)
def test_texts_need_a_file_and_an_encoder(clips: Path, tmp_path: Path, options: BuildOptions, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        build_shards(clips, tmp_path / "out", options)


class Counted:
    """An encoder that gives the length of the text, and counts what it is asked."""

    tag, width = "counted-v1", 1

    def __init__(self, scale: float = 1.0) -> None:
        self.asked: list[str] = []
        self.scale = scale

    def encode(self, text: str) -> torch.Tensor:
        self.asked.append(text)
        return torch.full((len(text), 1), len(text) * self.scale)


def test_equal_texts_are_embedded_once(tmp_path: Path) -> None:
    encoder = Counted()
    texts = {"x.mp4": "one  two", "y.mp4": "one two ", "z.mp4": "three"}
    found = embed_captions(texts, encoder.tag, lambda: encoder, tmp_path)
    assert encoder.asked == ["one two", "three"]
    assert found["x.mp4"] == found["y.mp4"] != found["z.mp4"] and found["z.mp4"].text == "three"
    text = caption_embedding(found["z.mp4"])
    assert text.tag == "counted-v1" and text.data[:, 0].tolist() == [5.0] * 5 + [0.0] * 507


def test_texts_of_an_earlier_build_are_not_embedded_again(tmp_path: Path) -> None:
    """The encoder is not even loaded when all are there; a damaged file, another encoder or machine are new work."""
    first, texts = Counted(), {"x.mp4": "one", "y.mp4": "two words"}
    found = embed_captions(texts, first.tag, lambda: first, tmp_path, "here")
    assert embed_captions(texts, first.tag, pytest.fail, tmp_path, "here") == found
    more = Counted()
    embed_captions({**texts, "z.mp4": "three"}, more.tag, lambda: more, tmp_path, "here")
    assert more.asked == ["three"]
    data = bytearray(found["x.mp4"].embedding.read_bytes())
    data[-1] ^= 1
    found["x.mp4"].embedding.write_bytes(data)
    again = Counted()
    assert embed_captions(texts, again.tag, lambda: again, tmp_path, "here") == found and again.asked == ["one"]
    assert caption_embedding(found["x.mp4"]).data[:, 0].tolist() == [3.0] * 3 + [0.0] * 509
    elsewhere = Counted()
    embed_captions(texts, elsewhere.tag, lambda: elsewhere, tmp_path, "there")
    assert elsewhere.asked == ["one", "two words"]
    with pytest.raises(CaptionError, match="is 'counted-v1': expected 'other-v1'"):
        embed_captions(texts, "other-v1", Counted, tmp_path, "here")


def test_a_text_that_gives_no_numbers_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CaptionError, match="'three': counted-v1 gave NaN or infinity"):
        embed_captions({"z.mp4": "three"}, Counted.tag, lambda: Counted(1e6), tmp_path)
