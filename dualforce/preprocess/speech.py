"""Stage 2: where somebody speaks, in the whole sound of a video."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dualforce.codecs.protocols import Samples
from dualforce.codecs.voice_activity import STEP, VoiceActivity
from dualforce.preprocess.finder import Finder

SPEECH = 0.5  # probability from which 32 ms count as speech


@dataclass(frozen=True)
class SpeechTrack:
    """Probability of speech [N] fp32 in each STEP samples at 16 kHz from time zero, and who found it."""

    finder: Finder
    probabilities: NDArray[np.float32]

    def share(self, samples: slice) -> float:
        """Share of the steps whose middle lies in a stretch of sound that are speech; 0 where there is no sound."""
        first, last = ((edge + STEP // 2) // STEP for edge in (samples.start, samples.stop))
        inside = self.probabilities[first:last]
        return float((inside >= SPEECH).mean()) if len(inside) else 0.0


def find_speech(wave: Samples, model: VoiceActivity) -> SpeechTrack:
    """The speech in 16 kHz sound [N]."""
    return SpeechTrack(Finder(model.tag, model.version, model.weights), model.probabilities(wave))
