"""ZeRO-3's step on the device: the same numbers as DeepSpeed's own, in fewer passes over the gradients.

DeepSpeed 0.19.8 turns the gradients of a rank into fp64 for the norm, copies them into one tensor, and scales that in
place: 36 bytes a parameter beside the 28 of AdamW. They already lie in one tensor in the optimizer's order, so here the
norm reads them where they are, and one pass scales them into the fp32 gradient that the optimizer gets. PyTorch's AdamW
on a GPU is one pass with that, and with the copy of the new weights in the model's dtype.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.kernels.adamw.reference import Moments, Rates

# How many reductions and gathers may be under way before DeepSpeed makes the host wait for the oldest (2 of each as
# shipped): two of either are a layer. The host is then far enough ahead that the device has work while the losses,
# whose launches are many and short, and the optimizer's step are prepared.
REDUCTIONS_AHEAD, GATHERS_AHEAD = 8, 6
GATHERS = "_PartitionedParameterCoordinator__max_ongoing_fetch_events"
PARTITIONS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"


def lean_step(engine: Any) -> None:
    """Give the engine's ZeRO-3 optimizer this module's step, where its gradients stay on the device; on CUDA the host
    no longer waits there for the last of them.

    Raises RuntimeError for a DeepSpeed that does not keep a sub-group's gradients in the order of its weights.
    """
    optimizer = engine.optimizer
    if not optimizer.offload_optimizer:
        held = [sum(p.partition_numel() for p in group) for group in optimizer.fp16_groups]
        if held != [flat.numel() for flat in optimizer.fp32_partitioned_groups_flat]:
            raise RuntimeError("ZeRO-3's gradients do not lie as its weights do: expected DeepSpeed 0.19.8's layout")
        kernel = _one_pass(optimizer)
        own = (_LeanStep,) if kernel is None else (_OnePassAdamW, _LeanStep)
        optimizer.__class__, optimizer.adamw_step = type("LeanZero3", (*own, type(optimizer)), {}), kernel
        if isinstance(optimizer.reduce_and_partition_stream, torch.cuda.Stream):
            optimizer.reduce_and_partition_stream = WaitedStream()
            optimizer.max_param_reduce_events = REDUCTIONS_AHEAD
            setattr(optimizer.parameter_offload.get_param_coordinator(), GATHERS, GATHERS_AHEAD)


def _one_pass(optimizer: Any) -> Callable[..., None] | None:
    """The kernel for the whole step, where the step is that of PyTorch's AdamW on a GPU, all its tensors there."""
    inner, flats = optimizer.optimizer, optimizer.fp32_partitioned_groups_flat + optimizer.fp16_partitioned_groups_flat
    if type(inner) is not torch.optim.AdamW or not all(flat is not None and flat.is_cuda for flat in flats):
        return None
    if any(group["amsgrad"] or group["maximize"] for group in inner.param_groups):
        return None
    try:
        kernel: Callable[..., None] = importlib.import_module("megatron_ext.kernels.adamw.triton").adamw_step
    except ImportError:
        return None  # without Triton: the same step in more passes
    return kernel


def fill_sizes(config: dict[str, Any], units: list[int]) -> dict[str, Any]:
    """The configuration with the sizes that the file leaves out, from the elements of the gather units: whole are the
    unit at work and the next one; a unit's matrices are reduced as they come, without being packed with others."""
    largest = max(units)
    sizes = {
        "stage3_prefetch_bucket_size": largest,
        "stage3_max_live_parameters": 2 * largest,
        "stage3_max_reuse_distance": largest,
        "reduce_bucket_size": max(1, largest // 2),
    }
    return config | {"zero_optimization": sizes | config["zero_optimization"]}


class WaitedStream(torch.cuda.Stream):
    """DeepSpeed makes the host wait for its reductions after the backward, and the device then waits for the host to
    come to the optimizer: 3 ms of a step of `mova-lite`. It is enough that what is launched next waits for them."""

    def synchronize(self) -> None:
        torch.cuda.current_stream().wait_stream(self)


def average_scattered(place: Tensor, gradient: Tensor, group: Any) -> None:
    """place [N/ranks] = this rank's part of the mean over the group's ranks of gradient [N]."""
    if dist.get_backend(group) == "nccl":
        dist.reduce_scatter_tensor(place, gradient, dist.ReduceOp.AVG, group)
    else:  # gloo has no mean
        dist.reduce_scatter_tensor(place, gradient, dist.ReduceOp.SUM, group)
        place.div_(dist.get_world_size(group))


class _LeanStep:
    """Methods that replace those of DeepSpeedZeroOptimizer_Stage3."""

    grad_partitions_flat_buffer: Tensor
    fp16_groups: list[list[Any]]
    fp32_partitioned_groups_flat: list[Tensor]
    averaged_gradients: dict[int, list[Tensor] | None]
    dp_process_group: Any
    loss_scale: float
    clip_grad: float
    micro_step_id: int
    postscale_gradients: bool
    gradient_predivide_factor: float
    all2all_process_group: Any
    _offload_boundary_param_ids: set[int]

    def _DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(self, params: list[Any], dtype: torch.dtype) -> list[Tensor]:
        """A unit's matrices, which come alone, go straight to their place: DeepSpeed divides them in one pass and
        copies the rank's part in another."""
        param = params[0]
        place, group = getattr(self, PARTITIONS)[param.ds_id], param.ds_process_group
        alone = len(params) == 1 and param.grad.numel() == place.numel() * dist.get_world_size(group)
        plain = self.all2all_process_group is None and (
            not self.postscale_gradients or self.gradient_predivide_factor == 1.0
        )
        if not (alone and plain and self.micro_step_id == 0 and dtype == param.grad.dtype == place.dtype):
            return cast(list[Tensor], super()._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads(params, dtype))  # type: ignore[misc]
        average_scattered(place, param.grad.view(-1), group)
        return [place]

    def partition_grads(self, params: list[Any], partitions: list[Tensor]) -> Any:
        param = params[0]
        if partitions[0].data_ptr() != getattr(self, PARTITIONS)[param.ds_id].data_ptr():
            return super().partition_grads(params, partitions)  # type: ignore[misc]
        self._offload_boundary_param_ids.add(param.ds_id)
        if param.grad.is_cuda:
            param.grad.record_stream(torch.cuda.current_stream())
        param.grad = None
        return partitions

    def _get_norm_groups(self) -> list[Tensor]:
        """One group: the norm of all gradients, summed in fp64; DeepSpeed leaves a step out where it is not finite."""
        pieces = [self._gradients(i) for i in range(len(self.fp16_groups))]
        squared = torch.stack(torch._foreach_norm(pieces, 2, torch.float64)).square().sum()
        dist.all_reduce(squared, group=self.dp_process_group)
        return [squared.sqrt().float()]

    def _prepare_fp32_grad_for_sub_group(self, sub_group_id: int) -> None:
        """Nothing: `unscale_and_clip_grads` makes the fp32 gradient."""

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Tensor) -> None:
        clip = torch.ones_like(total_norm)
        if self.clip_grad > 0:
            clip = torch.clamp((total_norm / self.loss_scale + 1e-6) / self.clip_grad, min=1.0)
        scale = 1.0 / (clip * self.loss_scale)
        # [1] and not a number: bf16 times an fp32 tensor of one element is computed and kept in fp32.
        self.fp32_partitioned_groups_flat[sub_group_id].grad = self._gradients(sub_group_id) * scale.float().view(1)
        self.averaged_gradients[sub_group_id] = None

    def _gradients(self, sub_group_id: int) -> Tensor:
        """All gradients of a sub-group as they lie in the buffer, [N]."""
        sizes = [group.numel() for group in self.fp32_partitioned_groups_flat]
        return self.grad_partitions_flat_buffer.narrow(0, sum(sizes[:sub_group_id]), sizes[sub_group_id])


class _OnePassAdamW:
    """Methods that replace those of _LeanStep and of DeepSpeedZeroOptimizer_Stage3 where AdamW is one pass. What AdamW
    remembers stays in the optimizer's state, as PyTorch keeps it.

    DeepSpeed has just waited for the norm, to see whether it is finite. So numbers are read and computed on the host:
    on the device each would be a launch of its own, with nothing beside it to run. All are read before the first
    sub-group's pass begins, and during the passes the host prepares the next step.
    """

    adamw_step: Callable[..., None]
    optimizer: torch.optim.AdamW
    sub_group_to_group_id: dict[int, int]
    fp32_partitioned_groups_flat: list[Tensor]
    fp16_partitioned_groups_flat: list[Tensor]
    averaged_gradients: dict[int, list[Tensor] | None]
    loss_scale: float
    clip_grad: float
    _gradients: Callable[[int], Tensor]
    _unflatten_partitioned_parameters: Callable[[int], None]
    _scale: float
    _taken: list[int]

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: Tensor) -> None:
        if sub_group_id > 0:
            return
        clip = max((float(total_norm) / self.loss_scale + 1e-6) / self.clip_grad, 1.0) if self.clip_grad > 0 else 1.0
        self._scale = 1.0 / (clip * self.loss_scale)
        states = [_state(self.optimizer, weights) for weights in self.fp32_partitioned_groups_flat]
        steps = torch.stack([state["step"].to(total_norm.device) for state in states])
        self._taken = [int(step) for step in steps.tolist()]

    def _optimizer_step(self, sub_group_id: int) -> None:
        weights, copy = (
            flats[sub_group_id] for flats in (self.fp32_partitioned_groups_flat, self.fp16_partitioned_groups_flat)
        )
        group = self.optimizer.param_groups[self.sub_group_to_group_id[sub_group_id]]
        rates = Rates(float(group["lr"]), group["betas"], group["eps"], group["weight_decay"])
        state = _state(self.optimizer, weights)
        moments, number = Moments(state["exp_avg"], state["exp_avg_sq"]), self._taken[sub_group_id] + 1
        with torch.no_grad():
            self.adamw_step(weights, moments, self._gradients(sub_group_id), copy.data, rates, self._scale, number)
            state["step"] += 1
        self.averaged_gradients[sub_group_id] = None

    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None:
        self._unflatten_partitioned_parameters(sub_group_id)  # the weights are there already


def _state(optimizer: torch.optim.AdamW, weights: Tensor) -> dict[str, Tensor]:
    """Of these weights; zeros before their first step."""
    state: dict[str, Tensor] = optimizer.state[weights]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=weights.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weights), torch.zeros_like(weights)
    return state
