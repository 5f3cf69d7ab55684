"""ZeRO-3's step on the device: the same numbers as DeepSpeed's own, in fewer passes over the gradients.

DeepSpeed 0.19.8 turns the gradients of a rank into fp64 for the norm, copies them into one tensor, and scales that in
place: 36 bytes a parameter beside the 28 of AdamW. They already lie in one tensor in the optimizer's order, so here the
norm reads them where they are, and one pass scales them into the fp32 gradient that the optimizer gets.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# How many reductions and gathers may be under way before DeepSpeed makes the host wait for the oldest (2 of each as
# shipped): two of either are a layer. The host is then far enough ahead that the device has work while the losses,
# whose launches are many and short, and the optimizer's step are prepared.
REDUCTIONS_AHEAD, GATHERS_AHEAD = 8, 6
GATHERS = "_PartitionedParameterCoordinator__max_ongoing_fetch_events"


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
        optimizer.__class__ = type("LeanZero3", (_LeanStep, type(optimizer)), {})
        if isinstance(optimizer.reduce_and_partition_stream, torch.cuda.Stream):
            optimizer.reduce_and_partition_stream = WaitedStream()
            optimizer.max_param_reduce_events = REDUCTIONS_AHEAD
            setattr(optimizer.parameter_offload.get_param_coordinator(), GATHERS, GATHERS_AHEAD)


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


class _LeanStep:
    """Methods that replace those of DeepSpeedZeroOptimizer_Stage3."""

    grad_partitions_flat_buffer: Tensor
    fp16_groups: list[list[Any]]
    fp32_partitioned_groups_flat: list[Tensor]
    averaged_gradients: dict[int, list[Tensor] | None]
    dp_process_group: Any
    loss_scale: float
    clip_grad: float

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
