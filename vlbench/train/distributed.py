"""Data-parallel training over processes that ``torchrun`` starts: who am I, and collectives that keep gradients.

Convention of every loss in vlbench: with W ranks, each rank *returns* the value of the whole batch, and its gradients
are such that the *mean* over ranks, which DistributedDataParallel takes, is the gradient of the whole batch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from vlbench.core.errors import RunError, UserError


@dataclass(frozen=True)
class Ranks:
    """Where a process stands among all."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0


def ranks() -> Ranks:
    """Where this process stands; alone where no process group is set up."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


@contextlib.contextmanager
def session(device: str | None = None) -> Iterator[torch.device]:
    """Join the process group where ``torchrun`` started this process, and leave it at the end.

    Args:
        device: as the user says it; None: this process's own GPU where there is one.

    Yields:
        The device to train on.

    Raises:
        RunError: where the connection to another process breaks, since that process has ended.
    """
    chosen = _device(device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield chosen
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    _join("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    except RuntimeError as error:
        if not is_broken_connection(error):
            raise
        raise RunError(
            f"process {ranks().rank}: the connection to another process broke, which has ended; its own words say why. "
            "`torchrun --max-restarts N ... --resume` goes on from the last checkpoint"
        ) from error
    finally:
        dist.destroy_process_group()


def _join(backend: str) -> None:
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        dist.init_process_group(backend)
        return
    # torchrun's store outlives a restart, and with it the addresses of the processes before: who is early would call
    # the dead. On one machine the number of restarts tells them apart; machines count them each for itself.
    store, rank, world = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=dist.PrefixStore(f"restart-{restarts}", store), rank=rank, world_size=world)


def is_broken_connection(error: Exception) -> bool:
    """Whether ``error`` says that another process is gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or ("gloo" in text and "connect" in text)


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: expected cpu, cuda or cuda:<number>") from None
    if device.type == "cuda":
        if device.index is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError(
                f"--device {name}: every process of torchrun would take the same GPU; leave the number out, and each "
                "takes one of its own"
            )
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: torch sees no GPU here; leave --device out to train on the CPU")
        index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", 0))
        if index >= torch.cuda.device_count():
            raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs, so no cuda:{index}")
        device = torch.device("cuda", index)
    return device


def gather(local_BX: torch.Tensor) -> torch.Tensor:
    """All ranks' tensors in rank order along the first dimension, with gradients; every rank must hold the same B.

    The backward pass sums over ranks what each rank's loss says of *my* rows. A gather that drops those terms
    changes the direction of the gradient, not only its length (``tests/train/test_losses.py`` shows both).
    """
    return _Gather.apply(local_BX) if ranks().world > 1 else local_BX


def gather_constant(local_BX: torch.Tensor) -> torch.Tensor:
    """All ranks' tensors in rank order along the first dimension, for what has no gradient (labels)."""
    return _all_gather(local_BX) if ranks().world > 1 else local_BX


def mean_over_ranks(local: torch.Tensor) -> torch.Tensor:
    """The mean of a scalar over ranks; backward, each rank's own part, since the mean comes with the gradients."""
    return _MeanOverRanks.apply(local) if ranks().world > 1 else local


def gather_objects(value: Any) -> list[Any]:
    """Every rank's small picklable value, in rank order."""
    here = ranks()
    if here.world == 1:
        return [value]
    found: list[Any] = [None] * here.world
    dist.all_gather_object(found, value)
    return found


def from_first(value: Any) -> Any:
    """The first rank's small picklable value, on every rank."""
    if ranks().world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait for every rank."""
    if ranks().world > 1:
        dist.barrier()


def _all_gather(local_BX: torch.Tensor) -> torch.Tensor:
    gathered = local_BX.new_empty((ranks().world * local_BX.shape[0], *local_BX.shape[1:]))
    dist.all_gather_into_tensor(gathered, local_BX.contiguous())
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local_BX: torch.Tensor) -> torch.Tensor:
        ctx.rows = local_BX.shape[0]
        return _all_gather(local_BX)

    @staticmethod
    def backward(ctx: Any, grad_NX: torch.Tensor) -> torch.Tensor:
        total_NX = grad_NX.clone(memory_format=torch.contiguous_format)  # autograd may still hold the original
        dist.all_reduce(total_NX)
        start = ranks().rank * ctx.rows
        return total_NX[start : start + ctx.rows]


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor) -> torch.Tensor:
        total = local.detach().clone()
        dist.all_reduce(total)
        return total / ranks().world

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad
