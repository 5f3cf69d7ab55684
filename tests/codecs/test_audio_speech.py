"""HuBERT and Whisper features: aligned, whole, of the weights that the tag names, and nothing else."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dualforce.codecs import audio_logmel, audio_speech
from dualforce.codecs.audio_speech import FIELD, HOP, MARGIN, WINDOW, SpeechFeatures, parts
from dualforce.codecs.media import read_audio
from dualforce.codecs.protocols import CodecError
from dualforce.codecs.registry import audio_encoder, audio_encoder_in
from dualforce.config import ConfigError
from dualforce.types import SAMPLES_PER_FRAME

transformers = pytest.importorskip("transformers")
WIDTH = 32


def noise(samples: int, seed: int = 0) -> NDArray[np.float32]:
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def hubert(folder: Path, normalised: bool = True, seed: int = 0) -> Path:
    """The layout of hubert-large, narrow, with random weights."""
    torch.manual_seed(seed)
    config = transformers.HubertConfig(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, conv_dim=(16,) * 7,
        do_stable_layer_norm=True, feat_extract_norm="layer", num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    transformers.HubertModel(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=normalised).save_pretrained(folder)
    return folder


def whisper(folder: Path) -> Path:
    """A narrow Whisper with decoder, as checkpoints are published."""
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)
    transformers.WhisperFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("speech")
    return {"hubert": hubert(root / "hubert"), "whisper": whisper(root / "whisper")}


@given(st.integers(1, 20_000))
def test_windows_take_every_frame_once_and_see_around_it(count: int) -> None:
    found = list(parts(count))
    assert [frame for part in found for frame in range(part.first, part.last)] == list(range(count))
    for part in found:
        assert 0 <= part.start <= part.first < part.last <= part.stop <= count
        assert part.stop - part.start == min(WINDOW, count)
        assert part.start == 0 or part.first - part.start >= MARGIN
        assert part.stop == count or part.stop - part.last >= MARGIN


@pytest.mark.parametrize("kind", ["hubert", "whisper"])
@pytest.mark.parametrize("frames", [1, 3, 81])
def test_two_frames_a_pixel_frame(folders: dict[str, Path], kind: str, frames: int) -> None:
    encoder = audio_encoder_in(folders[kind])
    found = encoder.encode(noise(frames * SAMPLES_PER_FRAME))
    assert found.shape == (2 * frames, WIDTH) == (2 * frames, encoder.width)
    assert found.dtype == torch.float32 and bool(torch.isfinite(found).all()) and encoder.hz == 50
    assert torch.equal(found, SpeechFeatures(folders[kind]).encode(noise(frames * SAMPLES_PER_FRAME)))


def test_hubert_frames_lie_where_the_sound_is(tmp_path: Path) -> None:
    """The convolutions alone, without the attention that sees everything: frame i sees 400 samples from 320 i on."""
    encoder = SpeechFeatures(hubert(tmp_path, normalised=False))
    convolutions: Any = encoder._model.feature_extractor
    wave, changed = noise(20 * HOP), noise(20 * HOP)
    changed[7 * HOP + 100] += 1.0
    padded = [np.pad(x, (0, FIELD - HOP)) for x in (wave, changed)]
    with torch.no_grad():
        a, b = (convolutions(torch.from_numpy(x)[None])[0] for x in padded)
    assert a.shape[1] == 20
    moved = (a - b).abs().amax(0) > 1e-6
    seen = [i for i in range(20) if 320 * i <= 7 * HOP + 100 < 320 * i + FIELD]
    assert not moved[: min(seen)].any() and not moved[max(seen) + 1 :].any() and moved[seen].any()


def test_hubert_is_what_transformers_computes(folders: dict[str, Path]) -> None:
    model = transformers.HubertModel.from_pretrained(folders["hubert"]).eval()
    prepare = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folders["hubert"])
    wave = noise(50 * HOP) + 0.5  # neither zero mean nor unit variance
    values = prepare(wave, sampling_rate=16_000, return_tensors="pt").input_values
    with torch.no_grad():
        wanted = model(torch.nn.functional.pad(values, (0, FIELD - HOP))).last_hidden_state[0]
    # fp32 sums in another order through two layers, values of order 1.
    torch.testing.assert_close(SpeechFeatures(folders["hubert"]).encode(wave), wanted, rtol=1e-4, atol=1e-4)


def test_whisper_is_what_transformers_computes(folders: dict[str, Path]) -> None:
    model = transformers.WhisperModel.from_pretrained(folders["whisper"]).eval()
    prepare = transformers.WhisperFeatureExtractor.from_pretrained(folders["whisper"])
    wave = noise(50 * HOP)
    mel = prepare(wave, sampling_rate=16_000, return_tensors="pt").input_features
    with torch.no_grad():
        wanted = model.get_encoder()(mel).last_hidden_state[0, :50]
    torch.testing.assert_close(SpeechFeatures(folders["whisper"]).encode(wave), wanted, rtol=1e-4, atol=1e-4)


def test_long_sound_is_windowed_and_its_seams_do_not_matter_much(folders: dict[str, Path]) -> None:
    """A minute and a half of sound, and the same with another beginning: frames of later windows stay as they are."""
    encoder = SpeechFeatures(folders["whisper"])
    wave, other = noise(4500 * HOP), noise(4500 * HOP)
    other[: 500 * HOP] = noise(500 * HOP, seed=1)
    a, b = encoder.encode(wave), encoder.encode(other)
    assert a.shape == (4500, WIDTH)
    for part in parts(4500):  # each from its own window, at its own place
        alone = encoder.encode(wave[part.start * HOP : part.stop * HOP])
        assert torch.equal(a[part.first : part.last], alone[part.first - part.start : part.last - part.start])
    second = list(parts(4500))[1]
    assert second.start >= 500 and torch.equal(a[second.first :], b[second.first :])
    assert not torch.equal(a[:500], b[:500])


def test_trained_features_follow_the_sound(whisper_folder: Path, clips_dir: Path) -> None:
    """A real voice, and the same two pixel frames later: its features come four frames later. By cosine of what is not
    common to all frames, against features at the place where they were; Whisper's own positions do not move."""
    encoder = SpeechFeatures(whisper_folder)
    assert encoder.width == 384
    wave = read_audio(next(iter(sorted((clips_dir / "video").glob("*may_5s*")))))[: 100 * SAMPLES_PER_FRAME]
    late = np.concatenate((np.zeros(2 * SAMPLES_PER_FRAME, np.float32), wave))
    a, b = encoder.encode(wave), encoder.encode(late)
    a, b = a - a.mean(0), b - a.mean(0)

    def likeness(shift: int) -> float:
        first, second = a[20:180], b[20 + shift : 180 + shift]
        return float(torch.nn.functional.cosine_similarity(first, second, dim=1).mean())

    found = {shift: likeness(shift) for shift in range(-8, 9)}
    assert max(found, key=lambda shift: found[shift]) == 4, found
    assert found[4] > 0.9 > found[0], found


def test_the_tag_names_the_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    first = SpeechFeatures(folders["hubert"]).tag
    other = SpeechFeatures(hubert(tmp_path / "other", seed=5)).tag
    assert first != other and first.startswith("hubert-32-") and first.endswith("-v2")
    assert audio_encoder(first, folders["hubert"]).tag == first
    with pytest.raises(CodecError, match=f"other: is '{other}': expected '{first}'"):
        audio_encoder(first, tmp_path / "other")
    with pytest.raises(CodecError, match="needs --audio-encoder DIR"):
        audio_encoder(first)
    with pytest.raises(CodecError, match="unknown; expected 'logmel"):
        audio_encoder("wavlm-1024-x-v1", folders["hubert"])
    assert audio_encoder_in(None).tag == audio_logmel.TAG == audio_encoder(audio_logmel.TAG).tag


@pytest.mark.parametrize(
    ("kind", "file", "key", "value"),
    [
        ("hubert", "preprocessor_config.json", "do_normalize", False),
        ("hubert", "config.json", "hidden_act", "relu"),
        ("hubert", "config.json", "layer_norm_eps", 0.1),
        ("whisper", "config.json", "activation_function", "relu"),
    ],
)
def test_the_tag_names_settings_that_change_the_features(
    folders: dict[str, Path], tmp_path: Path, kind: str, file: str, key: str, value: Any
) -> None:
    other = tmp_path / "other"
    shutil.copytree(folders[kind], other)
    first, copied = SpeechFeatures(folders[kind]), SpeechFeatures(other)
    assert copied.tag == first.tag
    settings = json.loads((other / file).read_text())
    (other / file).write_text(json.dumps(settings | {key: value}))
    changed = SpeechFeatures(other)
    wave = np.random.default_rng(0).standard_normal(16_000).astype(np.float32) * 0.1 + np.float32(0.05)
    assert not torch.allclose(changed.encode(wave), first.encode(wave), atol=1e-3)
    assert changed.tag != first.tag


def broken(folders: dict[str, Path], to: Path, case: str) -> Path:
    shutil.copytree(folders["hubert"], to)
    if case == "config":
        (to / "config.json").write_text("[1]")
    elif case == "kind":
        config = json.loads((to / "config.json").read_text())
        (to / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    elif case == "weights":
        (to / "model.safetensors").unlink()
    elif case == "damaged":
        (to / "model.safetensors").write_bytes(b"\xff" * 100)
    elif case == "layers":
        config = json.loads((to / "config.json").read_text())
        (to / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    elif case == "gone":
        shutil.rmtree(to)
    elif case in CHANGED:
        change(to, *CHANGED[case])
        if case == "fields":  # kernels are in the shapes of the weights
            transformers.HubertModel(transformers.HubertConfig.from_pretrained(to)).save_pretrained(to)
    return to


# What another file of the folder says, and the feature extractor or network that follows from it hears something else.
CHANGED: dict[str, tuple[str, dict[str, Any]]] = {
    "rate": ("preprocessor_config.json", {"sampling_rate": 8000}),
    "channels": ("preprocessor_config.json", {"feature_size": 2}),
    "strides": ("config.json", {"conv_stride": [5, 2, 2, 2, 2, 2, 1]}),
    "fields": ("config.json", {"conv_kernel": [10, 3, 3, 3, 3, 2, 4]}),
}
WHISPER_CHANGED: dict[str, tuple[str, dict[str, Any]]] = {
    "rate": ("preprocessor_config.json", {"sampling_rate": 22_050}),
    "hop": ("preprocessor_config.json", {"hop_length": 320}),
    "length": ("preprocessor_config.json", {"chunk_length": 10}),
    "bands": ("preprocessor_config.json", {"feature_size": 128}),
}


def change(folder: Path, name: str, values: dict[str, Any]) -> None:
    """Give some keys of a JSON file in a folder other values."""
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | values))


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("config", "config.json: expected a JSON object, found list"),
        ("kind", "model_type = 'bert': expected hubert or whisper"),
        ("weights", "no weights: expected model.safetensors or"),
        ("damaged", "expected a hubert encoder"),
        ("layers", r"encoder.layers.2.* not in the weights \(\d+ such\)"),
        ("gone", "config.json: no such file"),
        ("rate", "sampling_rate = 8000: expected 16000"),
        ("channels", "feature_size = 2: expected 1"),
        ("strides", "a frame every 160 samples: expected 320"),
        ("fields", "a frame of 720 samples: expected 400"),
    ],
)
def test_another_folder_is_one_line(folders: dict[str, Path], tmp_path: Path, case: str, named: str) -> None:
    with pytest.raises((CodecError, ConfigError), match=named) as caught:
        SpeechFeatures(broken(folders, tmp_path / "folder", case))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("rate", "sampling_rate = 22050: expected 16000"),
        ("hop", "hop_length = 320: expected 160"),
        ("length", "chunk_length = 10: expected 30"),
        ("bands", "feature_size = 128: expected 80"),
    ],
)
def test_another_whisper_is_one_line(folders: dict[str, Path], tmp_path: Path, case: str, named: str) -> None:
    shutil.copytree(folders["whisper"], tmp_path / "folder")
    change(tmp_path / "folder", *WHISPER_CHANGED[case])
    with pytest.raises(CodecError, match=named) as caught:
        SpeechFeatures(tmp_path / "folder")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_width_that_is_the_default_need_not_be_said(whisper_folder: Path, tmp_path: Path) -> None:
    for path in whisper_folder.iterdir():
        shutil.copy(path, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    width = config.pop("d_model")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert SpeechFeatures(tmp_path).width == width == 384


def old_layout(folder: Path, to: Path) -> dict[str, torch.Tensor]:
    """The weights of a HuBERT folder as the published file names them: below `hubert.`, weight norm as `weight_g` and
    `weight_v`."""
    from safetensors.torch import load_file

    shutil.copytree(folder, to)
    (to / "model.safetensors").unlink()
    norm = "encoder.pos_conv_embed.conv."
    names = {f"{norm}parametrizations.weight.original{n}": f"{norm}weight_{letter}" for n, letter in enumerate("gv")}
    weights = load_file(folder / "model.safetensors")
    assert names.keys() <= weights.keys()
    return {f"hubert.{names.get(name, name)}": value for name, value in weights.items()}


def test_a_file_of_the_published_layout(folders: dict[str, Path], tmp_path: Path) -> None:
    weights = old_layout(folders["hubert"], tmp_path / "folder")
    torch.save(weights, tmp_path / "folder" / "pytorch_model.bin")
    found, expected = SpeechFeatures(tmp_path / "folder"), SpeechFeatures(folders["hubert"])
    wave = noise(3 * SAMPLES_PER_FRAME)
    assert found.tag != expected.tag and torch.equal(found.encode(wave), expected.encode(wave))


def test_a_packed_file_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """An archive whose members unpack to more than it is."""
    weights = old_layout(folders["hubert"], tmp_path / "folder")
    path = tmp_path / "folder" / "pytorch_model.bin"
    torch.save(weights, tmp_path / "plain.bin")
    with zipfile.ZipFile(tmp_path / "plain.bin") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member))
    with pytest.raises(CodecError, match="compressed or overlap"):
        SpeechFeatures(tmp_path / "folder")


def test_pickles_are_not_run(folders: dict[str, Path], tmp_path: Path) -> None:
    """An old-style file that would write a file when it is unpickled."""
    import pickle

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    folder = tmp_path / "folder"
    shutil.copytree(folders["hubert"], folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"encoder.layer_norm.weight": Trap()}, protocol=2))
    with pytest.raises(CodecError):
        SpeechFeatures(folder)
    assert not (tmp_path / "ran").exists()


IMPOSSIBLE = [np.zeros(0, np.float32), np.zeros((2, 9), np.float32), np.full(9, np.nan, np.float32)]


@pytest.mark.parametrize("wave", IMPOSSIBLE)
def test_impossible_sounds(folders: dict[str, Path], wave: NDArray[np.float32]) -> None:
    with pytest.raises(ValueError, match="expected"):
        audio_encoder_in(folders["hubert"]).encode(wave)


def test_without_transformers_one_line(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(audio_speech.importlib, "import_module", absent)
    with pytest.raises(CodecError, match="install the extra `speech`"):
        SpeechFeatures(folders["hubert"])
