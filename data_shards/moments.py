"""Mean and standard deviation per channel of the streams, in one pass over the clips.

Clips are merged by the pairwise update of Chan, Golub and LeVeque (1979) in float64, so a large mean does not eat the
variance and the result does not depend on how many clips there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from data_shards.schema import AUDIO_FRAMES, STRUCT_TOKENS, ClipSample, ShardError


class StreamMoments:
    """Accumulates the manifest's `statistics` over the clips that it is given.

    Video has two rows, frame 0 and the other frames, because frame 0 codes one pixel frame and the others four. The
    repeated slots of frame 0 in structure, audio and FLAME count once, slots without a valid FLAME not at all.
    """

    def __init__(self) -> None:
        self._first = _Moments()
        self._others = _Moments()
        self._struct = _Moments()
        self._audio = _Moments()
        self._flame = FlameMoments()

    def add(self, sample: ClipSample) -> None:
        """Include one clip that keeps the contract (`validate`)."""
        by_channel = sample.video.permute(0, 2, 3, 1)  # [F,H,W,C]
        self._first.add(by_channel[:1])
        self._others.add(by_channel[1:])
        self._struct.add(unrepeated(sample.struct, STRUCT_TOKENS - 1))
        self._audio.add(unrepeated(sample.audio, AUDIO_FRAMES - 2))
        self._flame.add(sample)

    def statistics(self, origin: str) -> dict[str, Any]:
        """{"video": {"mean": [[C],[C]], "std": ...}, "struct": {"mean": [Cs], "std": ...}, "audio": ...},
        and "flame" where the clips have it.

        Population standard deviations, without a floor. Raises ShardError when no clip has a second latent frame.
        """
        if not self._others.count:
            raise ShardError(f"{origin}: frames: 1: expected clips of at least 2 latent frames, for the statistics")
        rows, flame = (self._first, self._others), self._flame.entry()
        return {
            **({"flame": flame} if flame else {}),
            "video": {"mean": [row.mean.tolist() for row in rows], "std": [row.std.tolist() for row in rows]},
            "struct": {"mean": self._struct.mean.tolist(), "std": self._struct.std.tolist()},
            "audio": {"mean": self._audio.mean.tolist(), "std": self._audio.std.tolist()},
        }


class FlameMoments:
    """Of FLAME alone, which older sets have no statistics of."""

    def __init__(self) -> None:
        self._width = 0
        self._moments = _Moments()

    def add(self, sample: ClipSample) -> None:
        """Include one clip, if it has FLAME."""
        if sample.flame is None or sample.flame_valid is None:
            return
        self._width = sample.flame.shape[-1]
        valid = sample.flame_valid.flatten()[STRUCT_TOKENS - 1 :]
        self._moments.add(unrepeated(sample.flame, STRUCT_TOKENS - 1)[valid])

    def entry(self) -> dict[str, Any] | None:
        """{"mean": [Cf], "std": [Cf], "slots": how many they are of}; None for clips without FLAME.

        Without a valid slot they are zeros and ones.
        """
        if not self._width:
            return None
        if not self._moments.count:
            return {"mean": [0.0] * self._width, "std": [1.0] * self._width, "slots": 0}
        return {"mean": self._moments.mean.tolist(), "std": self._moments.std.tolist(), "slots": self._moments.count}


def unrepeated(track: Tensor, repeated: int) -> Tensor:
    """[F,T,D] -> [F*T - repeated, D]: the track without the first `repeated` slots, the copies in latent frame 0."""
    return track.flatten(0, 1)[repeated:]


class _Moments:
    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._squares = torch.zeros(0, dtype=torch.float64)

    @property
    def std(self) -> Tensor:
        return (self._squares / self.count).sqrt()

    def add(self, values: Tensor) -> None:
        rows = values.reshape(-1, values.shape[-1]).to(torch.float64)
        if not len(rows):
            return
        mean = rows.mean(0)
        squares = (rows - mean).square().sum(0)
        if not self.count:
            self.count, self.mean, self._squares = len(rows), mean, squares
            return
        total = self.count + len(rows)
        delta = mean - self.mean
        self._squares = self._squares + squares + delta.square() * (self.count * len(rows) / total)
        self.mean = self.mean + delta * (len(rows) / total)
        self.count = total
