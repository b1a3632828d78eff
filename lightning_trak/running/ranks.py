"""The few collectives. One process alone needs no process group."""

from typing import NamedTuple, TypeVar

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_SUM_BYTES = 1 << 26  # of a tensor on the host that go through the device at a time


class Ranks(NamedTuple):
    """The rank of this process and the world size, as a Trainer sees them.

    The Trainer decides, not the process group: a Trainer on rank zero alone must not wait for the other ranks.
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def of(cls, trainer: L.Trainer) -> "Ranks":
        """The Trainer's ranks; a single one before its processes run, and after spawned ones have ended."""
        together = dist.is_available() and dist.is_initialized() and trainer.world_size > 1
        return cls(trainer.global_rank, trainer.world_size) if together else cls()

    def share(self, count: int) -> range:
        """This rank's share of ``count`` things."""
        return range(self.rank, count, self.world_size)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every rank's tensor, in place; the tensor is contiguous and of the same shape everywhere."""
        if self.world_size == 1:
            return tensor
        if dist.get_backend() == "nccl" and tensor.device.type == "cpu":
            # NCCL sums on the device alone, which need not have room for a matrix of scores.
            for part in torch.split(tensor.view(-1), max(1, _SUM_BYTES // tensor.itemsize)):
                reduced = part.cuda()
                dist.all_reduce(reduced)
                part.copy_(reduced)
            return tensor
        dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Every rank's (picklable) value, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        gathered: list[T | None] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered  # type: ignore[return-value]

    def all_true(self, condition: bool) -> bool:
        """Whether the condition holds on every rank."""
        return bool(self.sum(torch.tensor(int(condition))) == self.world_size)
