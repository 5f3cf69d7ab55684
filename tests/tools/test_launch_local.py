"""Which processes and devices local training starts with."""

from __future__ import annotations

import pytest

from tools import launch_local


def started(
    monkeypatch: pytest.MonkeyPatch, gpus: int, *arguments: str, **env: str
) -> tuple[list[str], dict[str, str]]:
    """Command and environment that the launcher would be called with."""
    calls: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(launch_local.subprocess, "call", lambda command, env: calls.append((command, env)) or 0)
    monkeypatch.setattr(launch_local, "gpu_count", lambda: gpus)
    monkeypatch.setattr("sys.argv", ["launch_local", *arguments])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert launch_local.main() == 0
    return calls[0]


def test_cpu_starts_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    command, env = started(monkeypatch, 0, "--run", "a.json", "--out", "b")
    assert command[command.index("--num_gpus") + 1] == "2"
    assert command[command.index("--module") :] == ["--module", "dualforce.train", "--run", "a.json", "--out", "b"]
    assert env["DS_ACCELERATOR"] == "cpu"


def test_one_process_per_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    command, env = started(monkeypatch, 4, "--run", "a.json")
    assert command[command.index("--num_gpus") + 1] == "4"
    assert "DS_ACCELERATOR" not in env


def test_chosen_devices_stay_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    command, env = started(monkeypatch, 3, "--processes", "2", "--run", "a.json", CUDA_VISIBLE_DEVICES="5,6,7")
    assert "--num_gpus" not in command and env["CUDA_VISIBLE_DEVICES"] == "5,6"


@pytest.mark.parametrize("number", ["0", "5"])
def test_impossible_number_of_processes_is_refused(monkeypatch: pytest.MonkeyPatch, number: str) -> None:
    with pytest.raises(SystemExit) as error:
        started(monkeypatch, 4, "--processes", number, "--run", "a.json")
    assert error.value.code == 2


def test_checkout_is_importable_in_children() -> None:
    assert launch_local.environment()["PYTHONPATH"].split(":")[0].endswith(launch_local.__file__.split("/")[-3])
