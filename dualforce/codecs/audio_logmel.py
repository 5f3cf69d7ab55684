"""The `logmel` audio features: log energies in 80 mel bands at 50 Hz, computed from the sound alone, without weights.

Frame i looks at the 25 ms from 20 i ms on (its centre is at 20 i + 12.5 ms), so frames 2k and 2k+1 belong to pixel
frame k at 25 frames a second and the look-ahead past a pixel frame is 5 ms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dualforce.codecs.protocols import Samples, Wave
from dualforce.types import AUDIO_HZ, SAMPLE_RATE

TAG = "logmel-80-25ms-v1"
WIDTH = 80
HOP = SAMPLE_RATE // AUDIO_HZ  # 320 samples, 20 ms
WINDOW = 400  # samples, 25 ms
FFT = 512
BLOCK = 2**12  # frames computed together, 82 s of sound: 30 MB
FLOOR = 1e-10  # -100 dB under a full-scale tone, the least that 16-bit sound can carry; digital silence lies here


class LogMelAudio:
    """Features [frames,80] fp32 at 50 Hz of a 16 kHz mono wave."""

    tag = TAG
    width = WIDTH
    hz = AUDIO_HZ

    def __init__(self) -> None:
        self._window = torch.hann_window(WINDOW, periodic=False, dtype=torch.float64).float()
        self._bands = mel_bands(WIDTH, FFT, SAMPLE_RATE).float()

    def encode(self, wave: Wave) -> Tensor:
        """Features [ceil(N / 320), 80] fp32, base-10 logarithms from -10 up, of a wave [N] float32 in [-1, 1].

        640 samples, the sound of one pixel frame, give two frames; the last window reaches past the end of the wave
        and finds silence there. Raises ValueError for an empty, non-finite or misshapen wave.
        """
        if wave.ndim != 1 or not len(wave):
            raise ValueError(f"wave of shape {wave.shape}: expected [N] with N > 0")
        return torch.cat(list(self.stream(wave)))

    def stream(self, wave: Samples) -> Iterator[Tensor]:
        """What `encode` gives, BLOCK frames at a time. Raises ValueError for non-finite sound."""
        frames = -(-len(wave) // HOP)
        for first in range(0, frames, BLOCK):
            count = min(BLOCK, frames - first)
            yield self._rows(wave[first * HOP : (first + count - 1) * HOP + WINDOW], count)

    def _rows(self, wave: Wave, frames: int) -> Tensor:
        samples = torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))
        if not bool(torch.isfinite(samples).all()):
            raise ValueError("wave holds NaN or infinity: expected finite samples")
        padded = torch.nn.functional.pad(samples, (0, (frames - 1) * HOP + WINDOW - len(samples)))
        # An amplitude of 1 in one frequency gives power 1, whatever the window.
        spectrum = torch.fft.rfft(padded.unfold(0, WINDOW, HOP) * self._window, n=FFT) * (2 / self._window.sum())
        power = spectrum.real.square() + spectrum.imag.square()
        return torch.log10((power @ self._bands.T).clamp_min(FLOOR))


def mel_bands(count: int, fft: int, rate: int) -> Tensor:
    """Triangular bands [count, fft/2 + 1] float64, evenly spaced on the mel scale from 0 to rate/2, each with weights
    that sum to 1: a band holds the mean power of its frequencies."""
    edges = _hertz(torch.linspace(0.0, _mel(rate / 2), count + 2, dtype=torch.float64))
    bins = torch.arange(fft // 2 + 1, dtype=torch.float64) * rate / fft
    rising = (bins[None] - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins[None]) / (edges[2:] - edges[1:-1])[:, None]
    weights = torch.minimum(rising, falling).clamp_min(0)
    return weights / weights.sum(1, keepdim=True)


def _mel(hertz: float) -> float:
    """Slaney's scale (Auditory Toolbox, 1998): 3 mel per 200 Hz up to 1 kHz, then 27 mel per factor 6.4."""
    return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)


def _hertz(mel: Tensor) -> Tensor:
    return torch.where(mel < 15, mel * 200 / 3, 1000 * torch.exp((mel - 15) * math.log(6.4) / 27))
