"""Time the kernels and one transformer block on one NVIDIA GPU, beside what one would run without them.

    python -m tools.bench_kernels --only attention,block --json kernels.json

Every kernel, ours or not, is first compared with its reference, outputs and gradients: one that disagrees ends the run
with exit code 1 and one line. Shares are of the matrix product measured in this process and of the datasheet; those of
memory-bound kernels are of a copy that moves as many bytes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dualforce import launch
from dualforce.config import ConfigError
from megatron_ext.kernels.kernel_set import select_kernels
from tools.bench import attention_cases, block_cases, elementwise_cases
from tools.bench.measure import Setting
from tools.bench.rates import DATASHEET_TFLOPS, matmul_tflops
from tools.bench.table import show, write_json

GROUPS: dict[str, tuple[str, Callable[[Setting], list[dict[str, Any]]]]] = {
    # name: title, rows
    "attention": ("Frame-causal attention, one frame a chunk, bf16; shares of fwd+bwd", attention_cases.rows),
    "adaln": ("AdaLN family, 21x1024 tokens, bf16", elementwise_cases.adaln_rows),
    "qk": ("q/k norm and RoPE, 21x1024 tokens, 12 heads of 128, bf16", elementwise_cases.qk_rows),
    "block": ("One video block of mova-lite, 21x1024 tokens, 512 of text, bf16; shares of fwd+bwd", block_cases.rows),
}
PACKAGES = ("triton", "flash-attn-4")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the groups; returns the exit code: 2 and one line for a wrong input or no usable GPU."""
    options = parser().parse_args(arguments)
    launch.keep_compiled_kernels()
    try:
        groups = chosen(options.only)
        setting = prepare(options.quick)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    machine = described(setting)
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for name in groups:
        title, rows = GROUPS[name]
        found[name] = rows(setting)
        print("\n" + show(title, found[name]), flush=True)
    if options.json:
        write_json(options.json, {"machine": machine, "quick": setting.quick, "groups": found})
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="tools.bench_kernels", description=__doc__.split("\n")[0], allow_abbrev=False)
    made.add_argument("--only", default=",".join(GROUPS), help=f"comma-separated, of {', '.join(GROUPS)}")
    made.add_argument("--json", type=Path, help="file for the rows")
    made.add_argument("--quick", action="store_true", help="21 frames and width 1536 only")
    return made


def chosen(only: str) -> list[str]:
    """Names of groups from a comma-separated list. Raises ConfigError for another name."""
    names = only.split(",")
    wrong = [name for name in names if name not in GROUPS]
    if wrong:
        raise ConfigError(f"--only {only}: {wrong[0]!r}: expected some of {', '.join(GROUPS)}")
    return names


def prepare(quick: bool) -> Setting:
    """Our kernels, and the rate of the matrix product. Raises ValueError with one line where they cannot run."""
    if not torch.cuda.is_available():
        raise ConfigError("tools.bench_kernels: no CUDA device: expected an NVIDIA GPU")
    device = torch.device("cuda", torch.cuda.current_device())
    ours = select_kernels("fused", device, torch.bfloat16)
    return Setting(device, ours, matmul_tflops(), quick)


def described(setting: Setting) -> dict[str, Any]:
    """The device, versions of what the kernels run on, and the ceilings in TFLOP/s."""
    versions = {"torch": str(torch.__version__)} | {name: _version(name) for name in PACKAGES}
    rates = {"matmul TFLOP/s": round(setting.matmul, 1), "datasheet TFLOP/s": DATASHEET_TFLOPS}
    return {"device": torch.cuda.get_device_name(setting.device)} | versions | rates


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


if __name__ == "__main__":
    raise SystemExit(main())
