"""What the step benchmark compares: the project's own engine, and what one would run without it.

Every recipe trains the same TrainModule with AdamW, clipping and all losses on the same steps.

ours            gather units under ZeRO-3, fused kernels, CUDA graphs
ours-no-graphs  the same, launch by launch
ours-zero1      the first under ZeRO-1
fsdp2           the same kernels under torch's FSDP2, one gather a layer
usual           torch.compile of everything elementwise and FlexAttention, under ZeRO-3 with one gather a layer
usual-fsdp2     the same under FSDP2
plan            eager, and SDPA with a dense mask, under ZeRO-3 with one gather a layer
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dualforce.config import LossConfig, ModelConfig
from dualforce.model.layer import DualLayer
from dualforce.model.layers import ZeroLinear
from dualforce.train.engine import build_engine, parameter_groups
from dualforce.train.recompute import Recompute
from dualforce.train.train_module import TrainModule
from megatron_ext.kernels.attention.flex import FlexAttention
from megatron_ext.kernels.attention.plan import FramePlan
from megatron_ext.kernels.kernel_set import KernelSet, select_kernels
from megatron_ext.parallel.grid import ProcessGrid

NAMES = ("ours", "ours-no-graphs", "ours-zero1", "fsdp2", "usual", "usual-fsdp2", "plan")
LEARNING_RATE, CLIP = 1e-9, 1.0  # as small as DeepSpeed's warm-up leaves it in its first steps


def kernels_of(name: str, device: torch.device, model: ModelConfig) -> KernelSet:
    """The kernels of a recipe, in bf16."""
    if name.startswith("ours") or name == "fsdp2":
        return select_kernels("fused", device, torch.bfloat16, model.head_dims)
    plain = select_kernels("reference", device, torch.bfloat16)
    if name == "plan":
        return replace(plain, name=name, frame_causal=_dense_mask)
    # One compiled version for each shape, and no falling back to eager after the eighth.
    torch._dynamo.config.recompile_limit = 64
    compiled: dict[str, Any] = {
        kernel: torch.compile(getattr(plain, kernel), dynamic=False)
        for kernel in ("adaln", "gated_residual", "adaln_residual", "layer_norm", "split_heads")
    }
    return replace(plain, name=name, frame_causal=FlexAttention(device).frame_causal, **compiled)


def build(
    name: str, model: ModelConfig, kernels: KernelSet, config: dict[str, Any], grid: ProcessGrid, recompute: Recompute
) -> Any:
    """An engine with DeepSpeed's interface: called, `backward`, `step`. The weights are the same for every recipe, and
    none of them zero: with heads at zero every model would predict alike."""
    with mock.patch.object(ZeroLinear, "reset_parameters", _small_start):
        return _built(name, model, kernels, config, grid, recompute)


def _small_start(layer: nn.Linear) -> None:
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.normal_(layer.bias, std=0.02)


def _built(
    name: str, model: ModelConfig, kernels: KernelSet, config: dict[str, Any], grid: ProcessGrid, recompute: Recompute
) -> Any:
    loss = LossConfig()
    if name.startswith("ours"):
        made = partial(TrainModule, model, loss, kernels, 56)
        return build_engine(lambda place: made(place), config, grid, recompute, name != "ours-no-graphs")
    with torch.device(grid.device):
        if name.endswith("fsdp2"):
            return ShardedEngine(TrainModule(model, loss, kernels, 56), grid)
        deepspeed = importlib.import_module("deepspeed")
        module = TrainModule(model, loss, kernels, 56).bfloat16()
    deepspeed.utils.set_z3_leaf_modules(module, [DualLayer])
    return deepspeed.initialize(model=module, model_parameters=parameter_groups(module), config=config)[0]


class ShardedEngine:
    """FSDP2 (torch.distributed.fsdp.fully_shard) with what a step asks of an engine. bf16 in compute and reduction,
    fp32 masters, one gather a layer, as DeepSpeed is configured."""

    def __init__(self, module: nn.Module, grid: ProcessGrid) -> None:
        fsdp: Any = importlib.import_module("torch.distributed.fsdp")
        mesh = dist.device_mesh.init_device_mesh("cuda", (grid.world,))
        policy = fsdp.MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16, cast_forward_inputs=False
        )
        for layer in [m for m in module.modules() if isinstance(m, DualLayer)]:
            fsdp.fully_shard(layer, mesh=mesh, mp_policy=policy)
        self.module = fsdp.fully_shard(module, mesh=mesh, mp_policy=policy)
        groups = parameter_groups(module)
        self._optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=0.01, fused=True)
        self._norm: Any = None

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        norm: Any = nn.utils.clip_grad_norm_(self.module.parameters(), CLIP)
        self._norm = norm.full_tensor()  # of all ranks
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def get_global_grad_norm(self) -> Any:
        return self._norm

    def is_gradient_accumulation_boundary(self) -> bool:
        return True

    def zero_optimization(self) -> bool:
        return True

    def bfloat16_enabled(self) -> bool:
        return True

    def destroy(self) -> None:
        self._optimizer.state.clear()


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """The SDPA backend of the original plan: a dense mask leaves the flash path."""
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if name == "plan" else contextlib.nullcontext():
        yield


def _dense_mask(q: Tensor, k: Tensor, v: Tensor, plan: FramePlan) -> Tensor:
    sink, first, last = (torch.tensor(x, device=q.device)[:, None] for x in plan.bounds)
    key = torch.arange(k.shape[1], device=q.device)
    frames = (key < sink) | ((key >= first) & (key < last))
    mask = frames.repeat_interleave(q.shape[2], 0).repeat_interleave(k.shape[2], 1)
    flat_q, flat_k, flat_v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(flat_q, flat_k, flat_v, attn_mask=mask)
    return out.transpose(1, 2).unflatten(1, q.shape[1:3])
