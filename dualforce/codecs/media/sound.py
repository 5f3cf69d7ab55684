"""The sound of a file as 16 kHz mono on the project's clock, decoded in one pass, in memory or on the disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from dualforce.codecs.disk_rows import DiskRows
from dualforce.codecs.media.container import MediaError, opened, time_of
from dualforce.codecs.media_clock import PlacedSound, SoundPlacer
from dualforce.codecs.protocols import Wave
from dualforce.types import SAMPLE_RATE

MAX_JITTER = Fraction(1, 50)  # seconds a sound block may lie off the running clock before it counts as a hole

Placed = tuple[int, Wave]  # place of the first sample on the track, samples


def read_sound(path: Path, zero: Fraction | None = None) -> PlacedSound | None:
    """The sound of a file as 16 kHz mono from `zero` (file time in seconds; None: from its own first sample).

    Blocks are placed by their own timestamps, so a hole stays where it is. None without sound. All of it is held in
    memory, 230 MB an hour: see `stored_sound`. Raises MediaError.
    """
    placer = SoundPlacer(zero)
    parts = list(_placed(path, placer))
    if not placer.runs:
        return None
    track = np.zeros(placer.samples, np.float32)
    for place, wave in parts:
        track[place : place + len(wave)] = wave
    return PlacedSound(track, placer.start, placer.gap)


@contextlib.contextmanager
def stored_sound(path: Path, zero: Fraction | None, folder: Path) -> Iterator[PlacedSound | None]:
    """What `read_sound` gives, sample for sample, its wave in an unnamed file in `folder` and read from there in parts.

    Raises MediaError, and OSError when the disk is full.
    """
    placer = SoundPlacer(zero)
    with contextlib.closing(DiskRows(folder, np.dtype(np.float32))) as track:
        for place, wave in _placed(path, placer):
            track.write(place, wave)
        yield PlacedSound(track, placer.start, placer.gap) if placer.runs else None


def read_audio(path: Path) -> Wave:
    """Sound of any media file as float32 [N], 16 kHz mono, from its first sample. Raises MediaError without sound."""
    sound = read_sound(path)
    if sound is None or not len(sound.wave):
        raise MediaError(path, "no sound stream")
    return sound.wave[:]


def _placed(path: Path, placer: SoundPlacer) -> Iterator[Placed]:
    """The sound in parts, as it is decoded; nothing without sound."""
    with opened(path) as container:
        if container.streams.audio:
            yield from _decoded(container, container.streams.best("audio"), placer)


def _decoded(container: Any, stream: Any, placer: SoundPlacer) -> Iterator[Placed]:
    """Each run of sound without a hole is resampled and placed as one."""
    mixer: _Mixer | None = None
    expected = Fraction(0)
    for frame in container.decode(stream):
        stamp = time_of(frame)
        time = expected if stamp is None else stamp
        if mixer is None or abs(time - expected) > MAX_JITTER or not mixer.fits(frame):
            if mixer is not None:
                yield from map(placer.place, mixer.mix(None))
            mixer = _Mixer(frame)
            placer.begin(time)
            expected = time
        expected += Fraction(frame.samples, frame.sample_rate)
        yield from map(placer.place, mixer.mix(frame))
    if mixer is not None:
        yield from map(placer.place, mixer.mix(None))


class _Mixer:
    """Resamples sound of one kind to 16 kHz mono: the mean of its channels, weighted as FFmpeg does.

    FFmpeg's own weights for float sound add up to more than 1 (1.41 for stereo, 3.41 for 5.1), so that a voice in all
    channels would be louder the more of them there are, and beyond full scale. They are measured and divided out.
    """

    def __init__(self, frame: Any) -> None:
        import av

        self._kind = _sound_kind(frame)
        self._resampler = av.AudioResampler("flt", "mono", SAMPLE_RATE)
        ones = np.ones((1, 64 * frame.layout.nb_channels), np.float32)
        probe = av.AudioFrame.from_ndarray(ones, "flt", frame.layout.name)
        probe.sample_rate = SAMPLE_RATE
        self._sum = float(av.AudioResampler("flt", "mono", SAMPLE_RATE).resample(probe)[0].to_ndarray()[0, 0])

    def fits(self, frame: Any) -> bool:
        """Whether a frame is of the kind that this mixer was made for."""
        return self._kind == _sound_kind(frame)

    def mix(self, frame: Any | None) -> list[Wave]:
        """What comes out for a frame; None: what is left at the end."""
        return [out.to_ndarray()[0] / np.float32(self._sum) for out in self._resampler.resample(frame)]


def _sound_kind(frame: Any) -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate
