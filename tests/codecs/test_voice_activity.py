"""The network computed here is Silero's, and it tells speech from music, noise and silence."""

from __future__ import annotations

import warnings
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from dualforce.codecs import voice_activity
from dualforce.codecs.media import read_audio
from dualforce.codecs.protocols import CodecError
from dualforce.codecs.voice_activity import VoiceActivity
from dualforce.preprocess.speech import SpeechTrack, find_speech

pytest.importorskip("silero_vad")
SECOND = 16_000


def chords(seconds: float) -> np.ndarray:
    """Music: four chords of plucked harmonics a second apart."""
    time = np.arange(int(seconds * SECOND)) / SECOND
    wave = np.zeros_like(time)
    for second in range(int(seconds)):
        since = time - second
        for root in np.array([220.0, 277.2, 329.6]) * 2 ** ((second % 4) / 6):
            for harmonic in range(1, 6):
                wave += (
                    (since >= 0) * np.exp(-3 * since.clip(0)) * np.sin(2 * np.pi * root * harmonic * time) / harmonic
                )
    return (0.3 * wave / np.abs(wave).max()).astype(np.float32)


def sounds() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, 5 * SECOND).astype(np.float32)
    return {
        "silence": np.zeros(5 * SECOND, np.float32),
        "noise": noise,
        "rumble": (np.cumsum(noise - noise.mean()) / 40).astype(np.float32),
        "music": chords(5),
        "beep": np.sin(2 * np.pi * 1000 * np.arange(5 * SECOND) / SECOND).astype(np.float32) * 0.3,
    }


def test_the_packages_own_network_says_the_same(clips_dir: Path) -> None:
    wave = read_audio(clips_dir / "audio" / "real3dportrait_Obama_5s.wav")
    model = VoiceActivity()
    found = model.probabilities(wave)
    path = metadata.distribution("silero-vad").locate_file("silero_vad/data/silero_vad.jit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs = torch.jit.load(str(path))
    padded = torch.from_numpy(np.pad(wave, (0, -len(wave) % 512)))
    expected = [float(theirs(part, SECOND).detach()) for part in padded.split(512)]
    assert found.dtype == np.float32 and len(found) == -(-len(wave) // 512)
    # Float32 sums in another order, fed back 150 times.
    assert np.abs(found - expected).max() < 1e-4


def test_the_state_goes_on_from_block_to_block(clips_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wave = read_audio(clips_dir / "audio" / "real3dportrait_Obama_5s.wav")
    whole = VoiceActivity().probabilities(wave)
    monkeypatch.setattr(voice_activity, "BLOCK", 7)
    assert np.abs(VoiceActivity().probabilities(wave) - whole).max() < 1e-4


@pytest.mark.parametrize("name", ["silence", "noise", "rumble", "music", "beep"])
def test_no_speech(name: str) -> None:
    wave = sounds()[name]
    assert find_speech(wave, VoiceActivity()).share(slice(0, len(wave))) < 0.1


def test_speech(clips_dir: Path) -> None:
    for name in ("real3dportrait_Obama_5s.wav", "echomimic_echomimic_en.wav"):
        wave = read_audio(clips_dir / "audio" / name)
        assert find_speech(wave, VoiceActivity()).share(slice(0, len(wave))) > 0.6


def test_speech_is_placed_in_time(clips_dir: Path) -> None:
    """Three seconds of silence, then a voice: the share of each stretch is its own."""
    voice = read_audio(clips_dir / "audio" / "real3dportrait_Obama_5s.wav")
    track = find_speech(np.concatenate([np.zeros(3 * SECOND, np.float32), voice]), VoiceActivity())
    assert track.share(slice(0, 3 * SECOND)) == 0
    assert track.share(slice(3 * SECOND, 8 * SECOND)) > 0.6


def test_share_counts_the_steps_whose_middle_is_inside() -> None:
    finder = find_speech(np.zeros(1, np.float32), VoiceActivity()).finder
    track = SpeechTrack(finder, np.array([1, 0.5, 0.4, 0, 1], np.float32))
    assert track.share(slice(0, 5 * 512)) == pytest.approx(3 / 5)
    assert track.share(slice(256, 512 + 256)) == 1.0  # the middle of step 0 is at 256, that of step 1 at 768
    assert track.share(slice(257, 512 + 257)) == 1.0
    assert track.share(slice(2 * 512, 4 * 512)) == 0.0
    assert track.share(slice(100 * 512, 101 * 512)) == 0.0


def test_tag_names_version_and_weights() -> None:
    finder = find_speech(np.zeros(600, np.float32), VoiceActivity()).finder
    assert finder.version == metadata.version("silero-vad") and finder.weights and len(finder.weights) == 64
    assert finder.tag == f"silero-vad-16k-{finder.version}-{finder.weights[:8]}"


def test_nothing_to_hear() -> None:
    assert VoiceActivity().probabilities(np.zeros(0, np.float32)).shape == (0,)


def test_threads_are_left_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        VoiceActivity()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_absent_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(voice_activity, "distribution", absent)
    with pytest.raises(CodecError, match=r"silero-vad is not installed: pip install 'dualforce\[data\]'"):
        VoiceActivity()


@pytest.mark.parametrize("content", [b"", b"not an archive", None])
def test_other_weights_are_one_line(content: bytes | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "other.jit"
    if content is None:
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    else:
        path.write_bytes(content)
    monkeypatch.setattr(voice_activity, "_weights_file", lambda: (path, "9.9"))
    with pytest.raises(CodecError, match=r"other\.jit: silero-vad 9\.9: another network") as caught:
        VoiceActivity()
    assert "\n" not in str(caught.value)
