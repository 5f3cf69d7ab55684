"""Where a process meets its environment: ranks, device, threads, seeds and logging. The only reader of it."""

from __future__ import annotations

import importlib
import logging
import os
import random
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy
import torch
import torch.distributed

from megatron_ext.parallel.grid import ProcessGrid, check_grid

LEAVE_TOGETHER = timedelta(seconds=30)  # how long a rank that ends waits for the others to come as far
THREAD_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")


def start(sequence: int, seed: int) -> ProcessGrid:
    """Join the other ranks of this run and return the grid; works under deepspeed, torchrun, and alone.

    Raises ValueError when `sequence` does not divide the world size, before any rank waits for another. Also seeds the
    global generators (initial weights; noise has its own) and sets up logging.
    """
    cuda = torch.cuda.is_available()
    _defaults(cuda)
    check_grid(int(os.environ["WORLD_SIZE"]), sequence)
    # DeepSpeed 0.19.8 calls torch's older names of the same collectives; nothing that a user could act on.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)
    logging.getLogger("DeepSpeed").addFilter(_worth_showing)
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", force=True
    )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))
    deepspeed = _import_deepspeed(cuda)
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    seed_everything(seed)
    return ProcessGrid.build(sequence, device)


def _worth_showing(record: logging.LogRecord) -> bool:
    # DeepSpeed's own start reads the learning rate before the first step, and warns itself about it.
    return "before it has started" not in record.getMessage()


def finish() -> None:
    """Leave the other ranks, after a run that came to its end."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        let_go()


def let_go() -> None:
    """Before a process ends: gloo's threads drop the tensors of the last collectives, for which they need the
    interpreter. One that still waits for it when it shuts down ends the process with SIGABRT."""
    time.sleep(0.1)  # whoever waits gets it at once


def wait_for_others() -> None:
    """Before a rank ends for a reason that all ranks have: who leaves while another still joins, or is told of the same
    reason, breaks its connection, and it would end with a word on that. Waits for `LEAVE_TOGETHER` at most, as ranks
    may have died; alone, and before the ranks have begun to meet, not at all."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    store = torch.distributed.PrefixStore("leaving", torch.distributed.distributed_c10d._get_default_store())
    try:
        store.set(f"here/{rank}", "")
        store.wait([f"here/{other}" for other in range(world)], LEAVE_TOGETHER)
        store.set(f"gone/{rank}", "")
        if rank == 0:  # which holds the store
            store.wait([f"gone/{other}" for other in range(world)], LEAVE_TOGETHER)
    except RuntimeError:  # DistError: too late, or the store is gone with the rank that held it
        return
    finally:
        let_go()


def is_main() -> bool:
    """Whether this process speaks for the run."""
    return os.environ.get("RANK", "0") == "0"


def speaks(agreed: bool) -> bool:
    """Whether this process tells why it ends. `agreed`: all ranks know that they end for the same reason. Where they
    have not met, each machine's first one does, as the other machines may not have that reason; where they have, and
    have not agreed, everyone."""
    if torch.distributed.is_initialized():
        return is_main() or not agreed
    return os.environ.get("LOCAL_RANK", "0") == "0"


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, on every device, equally on every rank: all start from equal weights."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def keep_compiled_kernels() -> None:
    """flash-attn-4 compiles for a minute or two: kept on disk, a later start takes seconds. Before its first import."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")


def _defaults(cuda: bool) -> None:
    if cuda:
        keep_compiled_kernels()
    alone = "RANK" not in os.environ
    world = os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    # The deepspeed launcher sets no LOCAL_WORLD_SIZE; on one node it is the world.
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if alone:
        os.environ.setdefault("MASTER_PORT", str(free_port()))
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if os.environ["LOCAL_WORLD_SIZE"] == world and "lo" in (name for _, name in socket.if_nameindex()):
            # All ranks are here: do not depend on the machine's name resolving to a reachable address.
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Processes that are started inside compute with one thread, as far as libraries take it from the environment."""
    before = {name: os.environ.get(name) for name in THREAD_COUNTS}
    os.environ.update(dict.fromkeys(THREAD_COUNTS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def expandable_segments() -> bool:
    """Whether the environment asks torch for memory that grows in place."""
    settings = (os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    return any("expandable_segments:true" in setting.replace(" ", "").lower() for setting in settings)


def child_environment(number: int) -> dict[str, str]:
    """For a process that every rank starts beside itself: child `number` of all ranks meets at a port of its own."""
    port = os.environ.get("MASTER_PORT")
    return {**os.environ, **({} if port is None else {"MASTER_PORT": str(int(port) + 1 + number)})}


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _import_deepspeed(cuda: bool):  # type: ignore[no-untyped-def]
    """DeepSpeed reads its accelerator when it is imported, so the import waits for the environment."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not cuda:
        # On the CPU init_distributed would compile a communication op that training never uses, for minutes, and a
        # killed build leaves a lock that makes every later run wait.
        importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
