"""The stream on which ZeRO-3 reduces gradients: work launched after it waits, the host does not."""

from __future__ import annotations

import pytest
import torch

from dualforce.train.zero3 import WaitedStream

pytestmark = pytest.mark.gpu

CYCLES = 400_000_000  # about 0.2 s on an H100


def test_later_work_waits_and_the_host_does_not() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    stream, written = WaitedStream(), torch.zeros(1000, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        written.fill_(3.0)
    stream.synchronize()
    assert not stream.query()  # it is still at work
    assert written.sum().item() == 3000.0
