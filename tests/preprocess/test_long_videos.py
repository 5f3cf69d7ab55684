"""What a long video takes: memory that hardly grows with its length, and the same samples as if all were in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.clips import copy_head
from helpers.long_videos import make_long
from hypothesis import given, settings
from hypothesis import strategies as st

from dualforce.codecs import audio_logmel
from dualforce.codecs.audio_logmel import LogMelAudio
from dualforce.codecs.disk_rows import DiskRows
from dualforce.codecs.media import container, probe, read_sound, stored_sound
from dualforce.preprocess import features, quality

ROOT = Path(__file__).resolve().parents[2]
HOURS, MOST = 10, 1536  # MiB resident, of a video of ten hours


def preprocess(video: Path, scratch: Path) -> dict[str, Any]:
    scratch.mkdir()
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    done = subprocess.run(
        [sys.executable, "-m", "helpers.long_videos", str(video), str(scratch)],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("short", "long", "room"),
    [(4, 20, 45), pytest.param(10, 60, 60, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])],
)
def test_memory_hardly_grows_with_the_length(short: int, long: int, room: int, tmp_path: Path) -> None:
    """Sound alone, held whole, is 59 MiB for sixteen minutes more. `room` is for the allocator, in MiB (5 to 31)."""
    found = {}
    for minutes in (short, long):
        make_long(tmp_path / f"{minutes}.mp4", 60 * minutes)
        found[minutes] = preprocess(tmp_path / f"{minutes}.mp4", tmp_path / f"scratch{minutes}")
        assert found[minutes]["samples"] >= 3 * minutes, found
        (tmp_path / f"{minutes}.mp4").unlink()
    print(f"\n{found}")
    assert found[long]["peak"] - found[short]["peak"] < room, found
    assert found[long]["peak"] < MOST


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_sound_on_the_disk_is_the_sound_in_memory(suffix: str, tmp_path: Path) -> None:
    video = tmp_path / f"clip.{suffix}"
    make_long(video, 140, rate=Fraction(5))
    zero = probe(video).zero
    whole = read_sound(video, zero)
    assert whole is not None and len(whole.wave) > 2 * quality.BLOCK
    assert not list(tmp_path.glob("*tmp*"))
    with stored_sound(video, zero, tmp_path) as stored:
        assert stored is not None and (stored.start, stored.gap) == (whole.start, whole.gap)
        assert np.array_equal(stored.wave[:], whole.wave)
        rng = np.random.default_rng(0)
        for start, stop in rng.integers(0, len(whole.wave) + 9000, (50, 2)):
            assert np.array_equal(stored.wave[start:stop], whole.wave[start:stop])
        assert quality.rms(stored.wave) == pytest.approx(quality.rms(whole.wave), rel=1e-12)
        here, there = features.loudness(stored.wave), features.loudness(whole.wave)
        assert np.array_equal(here.power, there.power) and here.least == there.least
        assert torch.equal(torch.cat(list(LogMelAudio().stream(stored.wave))), LogMelAudio().encode(whole.wave))
    assert [path.name for path in tmp_path.iterdir()] == [video.name]  # nothing is left


def test_real_sound_on_the_disk(clips_dir: Path, tmp_path: Path) -> None:
    copy_head(clips_dir / "video" / "lieu_60s.mp4", tmp_path / "a.mp4", 20)
    zero = probe(tmp_path / "a.mp4").zero
    whole = read_sound(tmp_path / "a.mp4", zero)
    with stored_sound(tmp_path / "a.mp4", zero, tmp_path) as stored:
        assert whole is not None and stored is not None and np.array_equal(stored.wave[:], whole.wave)
        assert quality.rms(stored.wave) == quality.rms(whole.wave)


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_logmel_features_do_not_depend_on_the_parts(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    wave = np.random.default_rng(0).normal(0, 0.1, 16_000 * 3 + 123).astype(np.float32)
    whole = LogMelAudio().encode(wave)
    monkeypatch.setattr(audio_logmel, "BLOCK", block)
    parts = list(LogMelAudio().stream(wave))
    assert len(parts) == -(-len(whole) // block)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 50)), max_size=8), st.sampled_from([(), (3,)]))
def test_rows_come_back_as_they_were_written(writes: list[tuple[int, int]], shape: tuple[int, ...]) -> None:
    """At any place, over earlier ones, with zeros where nothing was written."""
    wanted = np.zeros((max((first + count for first, count in writes if count), default=0), *shape), np.float16)
    with closing(DiskRows(Path("."), np.dtype(np.float16), shape)) as rows:
        for number, (first, count) in enumerate(writes):
            part = np.full((count, *shape), number + 1, np.float16)
            rows.write(first, part)
            wanted[first : first + count] = part
        assert len(rows) == len(wanted) and np.array_equal(rows[:], wanted)
        assert np.array_equal(rows[10:40], wanted[10:40]) and rows[5:2].shape == (0, *shape)
        rows.append(np.full((2, *shape), 9, np.float16))
        assert np.array_equal(rows[len(wanted) :], np.full((2, *shape), 9, np.float16))
        with pytest.raises(ValueError, match="expected"):
            rows.append(np.zeros((2, *shape), np.float32))


def test_large_pictures_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many at once as fit into 128 MiB: a decoder's threads each hold a picture."""
    monkeypatch.setattr(container.os, "cpu_count", lambda: 64)
    assert [container._threads(w * h) for w, h in ((640, 360), (1920, 1080), (3840, 2160), (7680, 4320), (0, 0))] == [
        16, 16, 5, 1, 16,
    ]  # fmt: skip
    monkeypatch.setattr(container.os, "cpu_count", lambda: 2)
    assert container._threads(1920 * 1080) == 2
