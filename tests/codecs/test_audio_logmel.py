"""The `logmel` features: count, place in time and frequency."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dualforce.codecs.audio_logmel import LogMelAudio, mel_bands


@pytest.mark.parametrize("frames", [1, 2, 81, 85])
def test_two_frames_per_pixel_frame(frames: int) -> None:
    assert LogMelAudio().encode(np.zeros(640 * frames, np.float32)).shape == (2 * frames, 80)


@pytest.mark.parametrize("sample", [4000, 8000, 8080, 12_345])
def test_a_click_lies_in_the_frames_that_look_at_it(sample: int) -> None:
    """Frame i sees samples 320 i .. 320 i + 400, its centre at 20 i + 12.5 ms."""
    wave = np.zeros(16_000, np.float32)
    wave[sample] = 1
    energy = LogMelAudio().encode(wave).mean(dim=1)
    heard = set((energy > -9.99).nonzero().flatten().tolist())
    # The window is 0 at its ends, where a click is not heard.
    assert heard and heard <= {i for i in range(50) if 320 * i <= sample < 320 * i + 400}
    nearest = min(range(50), key=lambda i: abs(320 * i + 200 - sample))
    assert int(energy.argmax()) == nearest


def test_a_tone_lies_in_its_band() -> None:
    n = np.arange(16_000) / 16_000
    bands = mel_bands(80, 512, 16_000)
    centres = (bands * torch.arange(257)).sum(1) / bands.sum(1) * 31.25
    for hertz in (200, 1000, 4000):
        features = LogMelAudio().encode(np.sin(2 * np.pi * hertz * n).astype(np.float32))
        loudest = features[5:45].mean(0).argmax()
        assert abs(float(centres[loudest]) - hertz) < 0.08 * hertz
        assert -0.6 < float(features[5:45, loudest].mean()) <= 0.1  # a tone of amplitude 1 has power 1


def test_ten_times_quieter_is_two_less() -> None:
    wave = np.random.default_rng(0).normal(0, 0.3, 16_000).astype(np.float32)
    difference = LogMelAudio().encode(wave) - LogMelAudio().encode(wave / 10)
    assert (difference - 2).abs().max() < 1e-3


def test_bands_cover_the_spectrum() -> None:
    bands = mel_bands(80, 512, 16_000)
    assert (bands.sum(1) - 1).abs().max() < 1e-9
    assert (bands >= 0).all() and ((bands > 0).sum(1) >= 1).all()
    assert (bands.sum(0)[4:250] > 0).all()


def test_silence_is_the_floor_and_context_is_local() -> None:
    encoder = LogMelAudio()
    assert torch.equal(encoder.encode(np.zeros(6400, np.float32)), torch.full((20, 80), -10.0))
    wave = np.random.default_rng(1).normal(0, 0.1, 16_000).astype(np.float32)
    changed = wave.copy()
    changed[8000:] = 0
    same = (encoder.encode(wave) == encoder.encode(changed)).all(dim=1)
    # Frame 24 looks at samples 7680 .. 8080: five milliseconds past its own 20 ms.
    assert same[:24].all() and not same[24] and not same[30]


@pytest.mark.parametrize("wave", [np.zeros(0), np.zeros((2, 640)), np.array([0.0, np.nan] * 400)])
def test_bad_wave(wave: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected"):
        LogMelAudio().encode(wave.astype(np.float32))
