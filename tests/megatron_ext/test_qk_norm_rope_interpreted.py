"""The Triton `split_heads` in Triton's interpreter, against its reference in float64.

The interpreter is chosen when triton is imported, so the cases run in a process of their own: this file, as a script.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, __file__], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def main() -> None:
    import torch
    from qk_cases import Case, check, strided, unused, without_gradients, wrong_arguments

    from megatron_ext.kernels.qk_norm_rope import triton as kernels

    torch.set_num_threads(1)
    bf16 = torch.bfloat16
    # The interpreter cuts fp32 to bf16 toward zero, where a GPU rounds to nearest: a whole step, not half of one.
    cut = 2.0
    for interleaved in (True, False):
        check(kernels, Case((2, 2, 3), 3, 16, interleaved=interleaved))
        check(kernels, Case((1, 2, 17), 4, 48, interleaved=interleaved, dtype=bf16), slack=cut)
        check(kernels, Case((2, 2, 3), 1, 48, angle_tokens=1, interleaved=interleaved))
        check(kernels, Case((2, 3, 1), 3, 2, interleaved=interleaved, dtype=bf16, weight_dtype=bf16), slack=cut)
        check(kernels, Case((1, 2, 3), 3, 6, parts=2, normed=1, interleaved=interleaved))
        check(kernels, Case((1, 2, 3), 4, 16, parts=1, normed=1, interleaved=interleaved, dtype=torch.float16))
    check(kernels, Case((2, 1, 3), 3, 16, parts=2, normed=1, angle_tokens=0))
    check(kernels, Case((1, 2, 2), 2, 16, parts=3, normed=1))
    check(kernels, Case((1, 2, 2), 2, 16, parts=3, normed=3, dtype=bf16), slack=cut)
    # Rows that the programs, and programs that the column sums' block, do not divide.
    with mock.patch.object(kernels, "backward_launch", lambda *_: kernels.Launch(1, 1, programs=5)):
        check(kernels, Case((1, 1, 17), 3, 16))
    check(kernels, Case((1, 1, 131), 1, 2, parts=1, normed=1))
    small = Case((2, 2, 3), 3, 16, dtype=bf16)
    for given in strided(small):
        check(kernels, small, given, cut)
    short = Case((1, 1, 3), 3, 16)
    for given in unused(short):
        check(kernels, short, given)
    without_gradients(kernels, small)
    wrong_arguments(kernels)


if __name__ == "__main__":
    main()
