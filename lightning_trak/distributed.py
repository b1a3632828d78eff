"""The few places where ranks meet, written so that one process needs no process group."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor, in place where the backend reduces on the tensor's device."""
    if world_size() == 1:
        return tensor
    if dist.get_backend() == "nccl" and tensor.device.type == "cpu":
        reduced = tensor.cuda()
        dist.all_reduce(reduced)
        return tensor.copy_(reduced)
    dist.all_reduce(tensor)
    return tensor


def all_gather(value: T) -> list[T]:
    """Every rank's (picklable) value, in the order of ranks."""
    if world_size() == 1:
        return [value]
    gathered: list[T | None] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered  # type: ignore[return-value]


def all_true(condition: bool) -> bool:
    """Whether the condition holds on every rank."""
    return bool(all_reduce_sum(torch.tensor(int(condition))) == world_size())
