"""Where somebody speaks: the network of Silero VAD, with the weights of the installed package `silero-vad`.

The package is not imported: importing it sets torch's thread count for the whole process. Only the tensors of its
TorchScript archive are taken, none of its code is run: the network (STFT, four convolutions, LSTM, one output) is
computed here, many steps at once, and a test compares it with the archive's. (The package has a safetensors file too,
but with weights of an earlier training that take singing for speech.)
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from dualforce.codecs.protocols import CodecError, Samples

STEP = 512  # samples at 16 kHz for one probability: 32 ms
CONTEXT = 64  # samples before them that the network sees too
BLOCK = 2048  # steps computed together
_FILE = "silero_vad/data/silero_vad.jit"


class Installed(NamedTuple):
    """The tag of the installed package's network, its version and the SHA-256 of its weights."""

    tag: str
    version: str
    weights: str


def installed() -> Installed:
    """What `VoiceActivity` would load. Raises CodecError when the package is absent."""
    path, version = _weights_file()
    weights = hashlib.sha256(path.read_bytes()).hexdigest()
    return Installed(f"silero-vad-16k-{version}-{weights[:8]}", version, weights)


class VoiceActivity:
    """Silero VAD at 16 kHz. `tag` names network, package version and weights; `weights` is the file's SHA-256."""

    def __init__(self) -> None:
        """Read the weights of the installed package. Raises CodecError when it is absent or has another network."""
        path, _ = _weights_file()
        self.tag, self.version, self.weights = installed()
        self._network = _Network()
        try:
            with warnings.catch_warnings():
                # torch advises against new TorchScript; this archive is the form in which the weights are published.
                warnings.simplefilter("ignore", DeprecationWarning)
                archive = torch.jit.load(str(path), map_location="cpu")
            self._network.load_state_dict(_tensors(archive.state_dict()))
        except (RuntimeError, KeyError, OSError) as error:
            cause = " ".join(str(error).split())[:200]
            raise CodecError(f"{path}: silero-vad {self.version}: another network: {cause}") from error
        self._network.requires_grad_(False).eval()

    def probabilities(self, wave: Samples) -> NDArray[np.float32]:
        """Probability of speech [ceil(N / 512)] fp32 in each 32 ms of 16 kHz sound [N]; silence follows its end. BLOCK
        steps of the sound are held at a time."""
        steps = math.ceil(len(wave) / STEP)
        found, state = [torch.zeros(0)], None
        for first in range(0, steps, BLOCK):
            count = min(BLOCK, steps - first)
            padded = torch.zeros(CONTEXT + count * STEP)
            before = CONTEXT if first else 0
            heard = np.ascontiguousarray(wave[first * STEP - before : (first + count) * STEP], np.float32)
            padded[CONTEXT - before : CONTEXT - before + len(heard)] = torch.from_numpy(heard)
            part = padded.unfold(0, CONTEXT + STEP, STEP)
            values, state = self._network(part, state)
            found.append(values)
        return torch.cat(found).numpy()


class _Network(nn.Module):
    """Steps with their context [N, 576] and the LSTM's state -> (probabilities [N], state)."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm = nn.LSTM(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        spectrum = self.stft_conv(functional.pad(x.unsqueeze(1), (0, 64), mode="reflect"))
        x = torch.hypot(spectrum[:, :129], spectrum[:, 129:])
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = convolution(x).relu()
        rows, state = self.lstm(x.squeeze(-1), state)  # [N,128]: the steps are the sequence
        return self.final_conv(rows.relu().unsqueeze(-1)).sigmoid().flatten(), state


def _tensors(archive: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The archive's tensors under the names of `_Network`; its LSTM cell is layer 0 of a sequence's LSTM."""
    names = {"stft_conv.weight": "stft.forward_basis_buffer"}
    for layer in range(4):
        for part in ("weight", "bias"):
            names[f"conv{layer + 1}.{part}"] = f"encoder.{layer}.reparam_conv.{part}"
    for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        names[f"lstm.{part}_l0"] = f"decoder.rnn.{part}"
    for part in ("weight", "bias"):
        names[f"final_conv.{part}"] = f"decoder.decoder.2.{part}"
    return {name: archive[f"_model.{origin}"] for name, origin in names.items()}


def _weights_file() -> tuple[Path, str]:
    """The weights and version of the installed package."""
    try:
        package = distribution("silero-vad")
    except PackageNotFoundError as error:
        raise CodecError("silero-vad is not installed: pip install 'dualforce[data]'") from error
    path = Path(str(package.locate_file(_FILE)))
    if not path.is_file():
        raise CodecError(f"{path}: no such file; expected the weights of silero-vad, version 6")
    return path, package.version
