"""Products of long token streams through quack-kernels, the CuTe kernels that flash-attn-4 brings.

Two things are gained over cuBLAS (docs/performance.md): an activation and its derivative happen in the epilogue of the
product beside them, so that tensors as large as the MLP's hidden layer are not read and written once more; and tiles of
192 columns leave less of the last wave of a narrow product empty than cuBLAS's 256.

Which kernel runs follows from shapes alone. Nothing is tuned at run time and no sum is split: equal inputs give equal
bits on every rank. Small, odd and unaligned matrices go to the plain products.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from megatron_ext.kernels.adaln.triton_plans import PROCESSORS
from megatron_ext.kernels.linear.products import PlainProducts

DTYPES = (torch.bfloat16, torch.float16)
ROWS = 2048  # fewer leave most of the GPU idle, and the wins are in memory traffic
TILE_ROWS = 128
CUBLAS_COLUMNS, COLUMNS, ACTIVATION_COLUMNS = 256, 192, 160  # of a tile
WAVES = 8  # of tiles: below, a wave more or less decides, and cuBLAS has smaller tiles to choose from
GAIN = 1.03  # how much fuller than cuBLAS's the waves of a plain product must be
WIDE = 3072  # inner width from which the backward product is bound by arithmetic and wants the larger tile


class QuackUnavailable(RuntimeError):
    """quack-kernels cannot run here; the message says why in one line."""


class QuackProducts:
    """The functions of `plain`, by quack where it is faster. Raises QuackUnavailable where it does not import."""

    def __init__(self, plain: PlainProducts) -> None:
        self._plain = plain
        try:
            interface = importlib.import_module("quack.gemm_interface")
            library = importlib.import_module("quack.epilogue.library")
            config: Any = importlib.import_module("quack.gemm_config").GemmConfig
            self._act, self._dact_bias = interface.gemm_act, library.dgelu_dbias_mod
            # Rows of two clusters share a tile of b, or columns a tile of a: as measured for each.
            self._narrow = _tile(config, COLUMNS, (2, 1))
            self._wide_backward = _tile(config, COLUMNS, (1, 2))
            self._backward = _tile(config, ACTIVATION_COLUMNS, (2, 1))
        except (ImportError, AttributeError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise QuackUnavailable(f"quack-kernels 0.6.5 or an equal of it does not import ({reason})") from None

    def product(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """a [M,K], b [K,N], bias [N] -> a b + bias [M,N]."""
        if not (_fits(a, b, bias) and fuller_waves(a.shape[0], b.shape[1])):
            return self._plain.product(a, b, bias)
        out: Tensor = self._act(a, b, bias=bias, activation=None, store_preact=False, config=self._narrow)[1]
        return out

    def gelu_product(self, a: Tensor, b: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """a [M,K], b [K,N], bias [N] -> hidden = a b + bias and its GELU, both [M,N]. The latter is of the unrounded
        sum."""
        if not _fits(a, b, bias):
            return self._plain.gelu_product(a, b, bias)
        hidden, activation = self._act(a, b, bias=bias, activation="gelu_tanh_approx", config=self._narrow)
        return hidden, activation

    def gelu_product_backward(self, grad: Tensor, weight: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `PlainProducts`. The column sum is that of the gradient before it is rounded."""
        if not (_fits(grad, weight, None) and _aligned(hidden)):
            return self._plain.gelu_product_backward(grad, weight, hidden)
        tile = self._wide_backward if grad.shape[1] >= WIDE else self._backward
        found = self._dact_bias(grad, weight, hidden, config=tile)
        return found["postact"], found["D"], found["dbias"].view(-1).to(hidden.dtype)


def fuller_waves(rows: int, columns: int) -> bool:
    """Whether tiles of 192 columns keep the processors busier than cuBLAS's of 256, in a product of many tiles."""
    waves, share = _waves(rows, columns, COLUMNS)
    return waves >= WAVES and share >= GAIN * _waves(rows, columns, CUBLAS_COLUMNS)[1]


def _waves(rows: int, columns: int, width: int) -> tuple[int, float]:
    """Waves of tiles, and the share of them that is work."""
    waves = -(-(-(-rows // TILE_ROWS) * -(-columns // width)) // PROCESSORS)
    return waves, rows * columns / (waves * PROCESSORS * TILE_ROWS * width)


def _tile(config: Any, columns: int, cluster: tuple[int, int]) -> Any:
    rows, across = cluster
    return config(
        tile_m=TILE_ROWS, tile_n=columns, pingpong=True, cluster_m=rows, cluster_n=across, device_capacity=9,
        is_dynamic_persistent=False,
    )  # fmt: skip


def _fits(a: Tensor, b: Tensor, bias: Tensor | None) -> bool:
    """Long, 16-bit and laid out as loads of 16 bytes want it."""
    if a.shape[0] < ROWS or a.dtype not in DTYPES or (bias is not None and bias.dtype != a.dtype):
        return False
    return _aligned(a) and (_aligned(b) or _aligned(b.t())) and b.shape[1] % 8 == 0


def _aligned(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.shape[1] % 8 == 0 and x.data_ptr() % 16 == 0
