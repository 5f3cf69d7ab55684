"""Synthesised vowel-like speech whose loudness is known exactly.

Source-filter model in the frequency domain: a glottal pulse train is the sum of all harmonics of the fundamental,
and a chain of formant resonators weighs each harmonic. Because the harmonics' amplitudes are known, the power of the
carrier is known too, and dividing by it makes the loudness of the sound follow the envelope and nothing else. The
same envelope opens the mouth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dualforce.types import SAMPLE_RATE

Floats = NDArray[np.float64]

MARGIN_S = 2.0  # speech exists this long before and after the clip, so that shifted sound is real sound
LEVEL = 0.09  # RMS of the sound at envelope 1
BREATH = 4e-4  # RMS of the noise floor

# First three formants in Hz (Peterson and Barney 1952, men) and how wide the mouth is, -1 rounded .. 1 spread.
_VOWELS: tuple[tuple[float, float, float, float], ...] = (
    (730.0, 1090.0, 2440.0, 0.1),  # a
    (530.0, 1840.0, 2480.0, 0.6),  # e
    (270.0, 2290.0, 3010.0, 1.0),  # i
    (570.0, 840.0, 2410.0, -0.6),  # o
    (300.0, 870.0, 2240.0, -1.0),  # u
)
_BANDWIDTHS = (80.0, 100.0, 140.0)  # Hz
_TOP_HZ = 6500.0
_CONTROL_HZ = 200


@dataclass(frozen=True)
class Speech:
    """Syllables on the time axis of the picture: seconds, frame 0 begins at 0."""

    centre: Floats  # [n] seconds
    half: Floats  # [n] half duration, seconds
    height: Floats  # [n] peak opening in (0, 1]
    vowel: NDArray[np.int64]  # [n] row of the vowel table

    def envelope(self, time: Floats) -> Floats:
        """Mouth opening and relative loudness at `time` [T], in [0, 1]: the largest raised cosine over it."""
        out = np.zeros_like(time)
        for centre, half, height in zip(self.centre, self.half, self.height, strict=True):
            first, last = np.searchsorted(time, (centre - half, centre + half))
            phase = (time[first:last] - centre) / half
            out[first:last] = np.maximum(out[first:last], height * 0.5 * (1.0 + np.cos(np.pi * phase)))
        return out

    def spread(self, time: Floats) -> Floats:
        """Mouth width at `time` [T], -1 rounded .. 1 spread."""
        return np.interp(time, self.centre, np.array([_VOWELS[v][3] for v in self.vowel]))

    def formants(self, time: Floats) -> Floats:
        """Formant frequencies at `time` [T] -> [T, 3] in Hz, gliding from syllable to syllable."""
        table = np.array([_VOWELS[v][:3] for v in self.vowel])
        return np.stack([np.interp(time, self.centre, table[:, i]) for i in range(3)], axis=1)


def make_speech(rng: np.random.Generator, seconds: float) -> Speech:
    """Phrases of 3 to 6 syllables with pauses, covering [-MARGIN_S, seconds + MARGIN_S]."""
    centre, half, height, vowel = [], [], [], []
    now, left = -MARGIN_S, int(rng.integers(3, 7))
    while now < seconds + MARGIN_S:
        duration = float(rng.uniform(0.18, 0.36))
        centre.append(now + duration / 2)
        half.append(duration / 2)
        height.append(float(rng.uniform(0.4, 1.0)))
        vowel.append(int(rng.integers(len(_VOWELS))))
        now += 0.85 * duration  # neighbours overlap, as in running speech
        left -= 1
        if left == 0:
            now += 0.15 * duration + float(rng.uniform(0.2, 0.5))
            left = int(rng.integers(3, 7))
    return Speech(np.array(centre), np.array(half), np.array(height), np.array(vowel, dtype=np.int64))


def _resonance(frequency: Floats, formants: Floats) -> Floats:
    """Magnitude of the resonator chain, unit gain at 0 Hz: prod f^2 / |f^2 - x^2 + i b x|; [T,h] and [T,3] -> [T,h]."""
    gain = np.ones_like(frequency)
    for i, bandwidth in enumerate(_BANDWIDTHS):
        centre2 = formants[:, i : i + 1] ** 2
        gain *= centre2 / np.hypot(centre2 - frequency**2, bandwidth * frequency)
    return gain


def _carrier(speech: Speech, time: Floats, pitch_hz: float, tract: float, drift: float) -> Floats:
    """Voice of constant RMS 1 at `time` [T] (uniform at SAMPLE_RATE)."""
    step = SAMPLE_RATE // _CONTROL_HZ
    coarse = np.append(time[::step], time[-1] + 1.0 / SAMPLE_RATE)
    fundamental = pitch_hz * (1.0 + 0.06 * np.sin(2 * np.pi * 0.6 * time + drift) + 0.01 * np.sin(2 * np.pi * 5 * time))
    phase = 2 * np.pi * np.cumsum(fundamental) / SAMPLE_RATE
    number = np.arange(1, int(_TOP_HZ / pitch_hz) + 1)
    # the glottal source falls by 12 dB per octave, radiation at the lips gives 6 back: amplitude 1 / number
    harmonics = np.interp(coarse, time, fundamental)[:, None] * number
    amplitude = _resonance(harmonics, tract * speech.formants(coarse)) / number
    amplitude /= np.sqrt(0.5 * np.sum(amplitude**2, axis=1, keepdims=True))
    out = np.zeros_like(time)
    for k in number:
        out += np.interp(time, coarse, amplitude[:, k - 1]) * np.cos(k * phase + 1.7 * k * k)
    return out


def synthesise(
    speech: Speech, rng: np.random.Generator, seconds: float, *, pitch_hz: float, tract: float, offset_s: float
) -> NDArray[np.float32]:
    """Sound of the clip, float32 [seconds * SAMPLE_RATE] in [-1, 1], heard `offset_s` after the picture shows it.

    The offset is rounded to whole samples and must lie within MARGIN_S (ValueError).
    """
    if abs(offset_s) > MARGIN_S:
        raise ValueError(f"offset_s {offset_s}: expected at most {MARGIN_S} s in either direction")
    samples, margin = round(seconds * SAMPLE_RATE), round(MARGIN_S * SAMPLE_RATE)
    time = (np.arange(samples + 2 * margin) - margin) / SAMPLE_RATE
    voice = LEVEL * speech.envelope(time) * _carrier(speech, time, pitch_hz, tract, float(rng.uniform(0, 6)))
    voice += BREATH * rng.standard_normal(len(time))
    start = margin - round(offset_s * SAMPLE_RATE)
    return np.clip(voice[start : start + samples], -1.0, 1.0).astype(np.float32)
