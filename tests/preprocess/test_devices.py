"""Devices are checked before any work, and dealt to workers in turn."""

from __future__ import annotations

import pytest
import torch

from dualforce.preprocess.build import BuildOptions
from dualforce.preprocess.devices import deal, kind_of_devices
from dualforce.preprocess.errors import BuildError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs of one kind and another."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ("A", "A", "B")[index])


def test_kinds(gpus: None) -> None:
    assert kind_of_devices(("cpu",)) == "cpu"
    assert kind_of_devices(("cuda:1", "cuda:0")) == "cuda A"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "--devices: none: expected cpu"),
        (("gpu",), "--devices 'gpu': expected cpu, or cuda:0"),
        (("cuda",), "--devices 'cuda': expected"),
        (("meta",), "--devices 'meta': expected"),
        (("cuda:3",), "--devices cuda:3: no such device: expected cuda:0 to cuda:2"),
        (("cuda:0", "cuda:0"), "--devices cuda:0,cuda:0: one occurs twice"),
        (("cuda:0", "cpu"), "--devices cpu: cpu: expected cuda A as cuda:0 is"),
        (("cuda:0", "cuda:2"), "--devices cuda:2: cuda B: expected cuda A"),
    ],
)
def test_bad_devices_are_one_line(gpus: None, names: tuple[str, ...], message: str) -> None:
    with pytest.raises(BuildError) as caught:
        kind_of_devices(names)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(BuildError, match="no such device: expected cpu, as no CUDA GPU is available here"):
        kind_of_devices(("cuda:0",))


def test_dealt_in_turn() -> None:
    assert deal(("cuda:0", "cuda:1"), 5) == ["cuda:0", "cuda:1", "cuda:0", "cuda:1", "cuda:0"]


def test_a_device_without_worker_is_refused() -> None:
    with pytest.raises(BuildError, match="--workers 1: expected at least 2, one for each device"):
        BuildOptions(workers=1, devices=("cuda:0", "cuda:1")).check()
