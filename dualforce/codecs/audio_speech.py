"""Audio features of a pretrained speech encoder, HuBERT or Whisper, from a folder as transformers writes it.

Both give 50 Hz frames, two a pixel frame, aligned without resampling:

- HuBERT (Hsu et al. 2021, arXiv 2106.07447): convolutions of stride 320 that see 400 samples. N samples alone give one
  frame less than N / 320; with 80 samples of silence at the end, frame i is centred at 20 i + 12.5 ms.
- Whisper (Radford et al. 2022, arXiv 2212.04356): log-mel frames at 100 Hz, halved by a convolution; frame i is centred
  at 20 i ms.

Both see the whole of what they are given, the future too. Sound longer than 30 s, the length Whisper is made for, is
cut into windows of that length; of neighbours that overlap by 6 s, each gives the part that it sees further around.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dualforce.codecs.checkpoint_file import check_packing
from dualforce.codecs.protocols import CodecError, Samples, Wave
from dualforce.config_file import read_json
from dualforce.types import AUDIO_HZ, SAMPLE_RATE

KINDS = ("hubert", "whisper")
HOP, FIELD = SAMPLE_RATE // AUDIO_HZ, 400  # samples between frames, and those that HuBERT's convolutions see
WINDOW, MARGIN = 30 * AUDIO_HZ, 3 * AUDIO_HZ  # frames of a window, and of its ends that a neighbour gives
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
BLOCK = 2**22  # samples whose mean and variance are taken at once: four minutes
# Settings of model and of its input that give other features from the same weights.
SETTINGS = {
    "hubert": (
        "conv_bias", "do_stable_layer_norm", "feat_extract_activation", "feat_extract_norm", "feat_proj_layer_norm",
        "hidden_act", "layer_norm_eps", "num_attention_heads",
    ),
    "whisper": ("activation_function", "encoder_attention_heads", "scale_embedding"),
}  # fmt: skip
PREPARED = {"hubert": ("do_normalize",), "whisper": ("dither", "n_fft", "padding_value")}
VERSION = "v2"


class Part(NamedTuple):
    """Frames [start, stop) of a sound that one window is run on, and [first, last) that are taken from it."""

    start: int
    stop: int
    first: int
    last: int


class Scale(NamedTuple):
    """Mean of a sound, and the deviation of its samples from it."""

    mean: np.float64
    deviation: np.float64


class SpeechFeatures:
    """Last hidden state of the encoder in `folder`, fp32. The tag names its kind and width, and the hash of its weights
    and settings."""

    hz = AUDIO_HZ

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """Raises ConfigError for a config.json that cannot be read, CodecError for another model, weights that are
        missing or damaged, another rate or clock, and without transformers (extra `speech`)."""
        config = read_json(folder / "config.json")
        kind = config.get("model_type")
        if kind not in KINDS:
            raise CodecError(f"{folder / 'config.json'}: model_type = {kind!r}: expected {' or '.join(KINDS)}")
        weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
        if weights is None:
            raise CodecError(f"{folder}: no weights: expected {' or '.join(WEIGHTS)}")
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        check_packing(weights)
        self._kind, self._device = kind, torch.device(device)
        self._model, self._prepare = _load(folder, kind)
        _check_clock(folder, kind, self._model.config, self._prepare)
        self._model.to(self._device).eval()
        self.width = int(self._model.config.hidden_size)  # Whisper's too has this name
        told = _settings(kind, self._model.config, self._prepare)
        digest = hashlib.sha256(f"{digest} {told}".encode()).hexdigest()
        self.tag = f"{kind}-{self.width}-{digest[:12]}-{VERSION}"

    def encode(self, wave: Wave) -> Tensor:
        """Features [ceil(N / 320), width] fp32 on the CPU of a 16 kHz wave [N] float32 in [-1, 1].

        Raises ValueError for an empty, non-finite or misshapen wave.
        """
        if wave.ndim != 1 or not len(wave):
            raise ValueError(f"wave of shape {wave.shape}: expected [N] with N > 0")
        return torch.cat(list(self.stream(wave)))

    def stream(self, wave: Samples) -> Iterator[Tensor]:
        """What `encode` gives, at most 30 s at a time. Raises ValueError for non-finite sound."""
        scale = _scale(wave) if self._kind == "hubert" and self._prepare.do_normalize else None
        for part in parts(-(-len(wave) // HOP)):
            last = (part.stop - 1) * HOP + FIELD if self._kind == "hubert" else part.stop * HOP
            samples = _cut(wave, part.start * HOP, last, scale)
            yield self._run(samples)[part.first - part.start : part.last - part.start].float().cpu()

    @torch.inference_mode()
    def _run(self, samples: Wave) -> Tensor:
        return self._hubert(samples) if self._kind == "hubert" else self._whisper(samples)

    def _hubert(self, samples: Wave) -> Tensor:
        hidden: Tensor = self._model(torch.from_numpy(samples)[None].to(self._device)).last_hidden_state[0]
        return hidden

    def _whisper(self, samples: Wave) -> Tensor:
        # Shorter sound is followed by silence up to 30 s: the positions of the encoder are those of a whole window.
        mel = self._prepare(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        hidden: Tensor = self._model(mel.to(self._device)).last_hidden_state[0]
        return hidden


def parts(count: int) -> Iterator[Part]:
    """Windows over `count` frames: whole ones of `WINDOW` where there is more than one, the last moved back to end with
    the sound; what is taken from them covers every frame once."""
    first = 0
    while first < count:
        start = max(0, min(first - MARGIN, count - WINDOW))
        stop = min(count, start + WINDOW)
        last = count if stop == count else stop - MARGIN
        yield Part(start, stop, first, last)
        first = last


def _cut(wave: Samples, start: int, stop: int, scale: Scale | None) -> Wave:
    """Samples [start, stop), scaled; silence after the end. Raises ValueError for non-finite ones."""
    found = wave[start:stop].astype(np.float32)
    if not np.isfinite(found).all():
        raise ValueError("wave holds NaN or infinity: expected finite samples")
    if scale is not None:
        found = ((found - scale.mean) / scale.deviation).astype(np.float32)
    return np.pad(found, (0, stop - start - len(found)))


def _scale(wave: Samples) -> Scale:
    """Zero mean and unit variance over the whole sound, as the large models were trained; the padding stays silent."""
    blocks = range(0, len(wave), BLOCK)
    mean = np.float64(sum(wave[at : at + BLOCK].sum(dtype=np.float64) for at in blocks)) / len(wave)
    squares = np.float64(sum(np.square(wave[at : at + BLOCK] - mean).sum() for at in blocks))
    return Scale(mean, np.sqrt(squares / len(wave) + 1e-7))


def _load(folder: Path, kind: str) -> tuple[Any, Any]:
    """(model in fp32, feature extractor). Nothing is fetched and no code of the folder runs: transformers reads
    safetensors, and older files with torch's loader of plain weights."""
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        raise CodecError(f"{folder}: needs transformers: install the extra `speech`, or use logmel features") from None
    # What it would print, missing weights above all, is checked below.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model_class = transformers.HubertModel if kind == "hubert" else transformers.WhisperModel
    prepare_class = transformers.Wav2Vec2FeatureExtractor if kind == "hubert" else transformers.WhisperFeatureExtractor
    try:
        prepare = prepare_class.from_pretrained(folder, local_files_only=True)
        model, report = model_class.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # of any kind: what the readers of several formats make of a damaged or foreign file
        raise CodecError(f"{folder}: {' '.join(str(error).split())[:300]}: expected a {kind} encoder") from None
    # What is missing would be random numbers, under a tag that claims otherwise.
    lost = [*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])]
    missing = sorted(name for name in lost if not name.startswith("decoder."))  # Whisper's decoder is not used
    if missing:
        raise CodecError(f"{folder}: {missing[0]}: not in the weights ({len(missing)} such): expected a {kind} encoder")
    return model if kind == "hubert" else model.get_encoder(), prepare


def _settings(kind: str, config: Any, prepare: Any) -> str:
    """Those of SETTINGS and PREPARED, in one text; a setting that this release of transformers lacks is null."""
    found = {name: getattr(config, name, None) for name in SETTINGS[kind]}
    found |= {name: getattr(prepare, name, None) for name in PREPARED[kind]}
    return json.dumps(found, sort_keys=True)


def _check_clock(folder: Path, kind: str, config: Any, prepare: Any) -> None:
    """Raise CodecError unless the network hears sound as it is given here, and its frames lie as the head of this file
    says: another folder of the same kind would give features of another moment."""
    if kind == "hubert":
        stride, field = math.prod(config.conv_stride), 1
        for kernel, step in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            field = (field - 1) * step + kernel
        found = {"a frame every": (stride, HOP), "a frame of": (field, FIELD)}
        for what, (samples, expected) in found.items():
            if samples != expected:
                raise CodecError(f"{folder / 'config.json'}: {what} {samples} samples: expected {expected}")
        wanted: Mapping[str, int] = {"sampling_rate": SAMPLE_RATE, "feature_size": 1}
    else:
        bands = config.num_mel_bins
        wanted = {"sampling_rate": SAMPLE_RATE, "hop_length": HOP // 2, "chunk_length": 30, "feature_size": bands}
    for key, value in wanted.items():
        if getattr(prepare, key, None) != value:
            place = folder / "preprocessor_config.json"
            raise CodecError(f"{place}: {key} = {getattr(prepare, key, None)!r}: expected {value}")
