"""run.sh installs once, in order, and says in one line what is wrong. A stand-in interpreter takes notes."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Answers like a Python that has venv and pip; each pip call is one line of the file that LOG names.
FAKE_PYTHON = """#!/bin/bash
case "$1 $2" in
  "-m venv") rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; echo "venv" >>"$LOG" ;;
  "-m pip") echo "DS_BUILD_OPS=${DS_BUILD_OPS:-} $*" >>"$LOG"; exit "${PIP_FAILS:-0}" ;;
  "-c import"*) case "$2" in *print*) echo "/base 3.11" ;; esac; exit "${UNSUITABLE:-0}" ;;
  *) echo "run $*" >>"$LOG"; [[ "$*" != "${FAILS:-}" ]] ;;
esac
"""


class Machine:
    """A copy of what run.sh needs, in a folder with a space, and an interpreter that only takes notes."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a copy"
        (self.root / "tools").mkdir(parents=True)
        for name in ("run.sh", "pyproject.toml", *(f"tools/constraints{kind}.txt" for kind in ("", "-cpu", "-cuda"))):
            shutil.copy(ROOT / name, self.root / name)
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.script("python", FAKE_PYTHON)
        self.script("nvidia-smi", "#!/bin/sh\nexit 9\n")
        self.log = folder / "log"
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()

    def script(self, name: str, text: str) -> Path:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run the copy from another working directory; the log is emptied first."""
        self.log.write_text("")
        values = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PYTHON": str(self.bin / "python"),
            "LOG": str(self.log),
            **env,
        }
        command = [str(self.root / "run.sh"), *arguments]
        return subprocess.run(command, cwd=self.elsewhere, env=values, capture_output=True, text=True)

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_setup_installs_torch_first_then_the_project(machine: Machine) -> None:
    result = machine.run("setup")
    assert result.returncode == 0, result.stderr
    venv, torch, project = machine.calls()
    assert venv == "venv"
    assert torch.endswith("constraints-cpu.txt torch")
    assert project.startswith("DS_BUILD_OPS=0 ") and project.endswith(f"--editable {machine.root}[data]")


def test_second_setup_skips_everything(machine: Machine) -> None:
    machine.run("setup")
    assert machine.run("setup").returncode == 0
    assert machine.calls() == []


def test_gpu_machine_takes_the_cuda_build_and_a_change_makes_a_new_environment(machine: Machine) -> None:
    machine.run("setup")
    machine.script("nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA something'\n")
    machine.run("setup")
    assert machine.calls()[0] == "venv"
    assert all("constraints-cuda.txt" in call for call in machine.calls()[1:])


def test_new_pins_install_again_into_the_same_environment(machine: Machine) -> None:
    machine.run("setup")
    with (machine.root / "tools/constraints.txt").open("a") as file:
        file.write("another==1\n")
    machine.run("setup")
    assert len(machine.calls()) == 2 and "venv" not in machine.calls()


def test_extras_add_up(machine: Machine) -> None:
    machine.run("setup", "dev")
    assert machine.calls()[-1].endswith("[data,dev]")
    machine.run("setup")
    assert machine.calls() == []


def test_failing_step_is_named_and_the_next_run_goes_on(machine: Machine) -> None:
    result = machine.run("setup", PIP_FAILS="1")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("run.sh: setup failed at: installing torch (cpu)")
    assert machine.run("setup").returncode == 0
    assert len(machine.calls()) == 2, "the environment itself was made by the first run"


def test_moved_copy_makes_its_own_environment(machine: Machine) -> None:
    machine.run("setup")
    machine.root = machine.root.rename(machine.root.with_name("moved"))
    machine.run("setup")
    assert machine.calls()[0] == "venv"


def test_demo_runs_the_tool_with_the_arguments_as_given(machine: Machine) -> None:
    machine.run("setup")
    machine.run("demo", "--videos", "my clips", "--steps", "3")
    assert machine.calls() == ["run -P -m tools.demo --videos my clips --steps 3"]


def test_train_goes_through_the_launcher(machine: Machine) -> None:
    machine.run("setup")
    machine.run("train", "a.json", "--out", "b")
    assert machine.calls() == ["run -P -m tools.launch_local --run a.json --out b"]


TESTS = ["-m ruff check .", "-m ruff format --check .", "-m mypy", "-m pytest -n 2 --dist loadfile -k some"]


def test_test_goes_from_the_quick_to_the_slow(machine: Machine) -> None:
    machine.run("setup", "download", "faces", "speech", "wan", "dev")
    assert machine.run("test", "-k", "some").returncode == 0
    assert machine.calls() == [f"run {arguments}" for arguments in TESTS]


@pytest.mark.parametrize(
    ("number", "what"),
    [(0, "the linter found something"), (1, "files are not formatted (ruff format . does it)"),
     (2, "the type checker found something")],
)  # fmt: skip
def test_test_ends_at_what_fails(machine: Machine, number: int, what: str) -> None:
    machine.run("setup", "download", "faces", "speech", "wan", "dev")
    result = machine.run("test", "-k", "some", FAILS=TESTS[number])
    assert (result.returncode, result.stderr) == (1, f"run.sh: test: {what}\n")
    assert machine.calls() == [f"run {arguments}" for arguments in TESTS[: number + 1]]


def test_unsuitable_python_is_one_line(machine: Machine) -> None:
    result = machine.run("setup", UNSUITABLE="1")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "PYTHON=" in line and "expected Python 3.11, 3.12 or 3.13" in line


def test_unknown_command_is_refused(machine: Machine) -> None:
    result = machine.run("trian")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "run.sh: unknown command 'trian'"
    assert machine.calls() == []


def test_help_needs_no_setup(machine: Machine) -> None:
    result = machine.run()
    assert result.returncode == 0 and "demo" in result.stdout and machine.calls() == []


def test_ci_runs_the_tests_and_nothing_else() -> None:
    code = [line for line in (ROOT / ".ci/run").read_text().splitlines() if line and not line.startswith("#")]
    assert len(code) == 1 and code[0].startswith("exec ") and "run.sh" in code[0] and " test " in code[0]
