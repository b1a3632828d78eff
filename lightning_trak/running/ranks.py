"""The few collectives that are needed. A single process needs no process group."""

from typing import NamedTuple, TypeVar

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_SUM_BYTES = 1 << 26  # a CPU tensor is summed on the device in pieces of this size


def is_one_of_several() -> bool:
    """Whether this process is one of several in a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


class Ranks(NamedTuple):
    """The rank of this process and the world size, as a Trainer sees them.

    They come from the Trainer, not from the process group: a Trainer that runs only on rank zero must not wait for the
    other ranks.
    """

    rank: int = 0
    world_size: int = 1

    @classmethod
    def of(cls, trainer: L.Trainer) -> "Ranks":
        """The Trainer's ranks. There is one rank before its processes run, and after spawned processes have ended."""
        together = dist.is_available() and dist.is_initialized() and trainer.world_size > 1
        return cls(trainer.global_rank, trainer.world_size) if together else cls()

    def share(self, count: int) -> range:
        """This rank's share of ``count`` items: every ``world_size``-th of them."""
        return range(self.rank, count, self.world_size)

    def barrier(self) -> None:
        """Wait until every rank has reached this point."""
        if self.world_size > 1:
            dist.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place. It must be contiguous and have the same shape on every rank."""
        if self.world_size == 1:
            return tensor
        if dist.get_backend() == "nccl" and tensor.device.type == "cpu":
            # NCCL only sums on the device, and a matrix of scores may not fit there.
            for part in torch.split(tensor.view(-1), max(1, _SUM_BYTES // tensor.itemsize)):
                reduced = part.cuda()
                dist.all_reduce(reduced)
                part.copy_(reduced)
            return tensor
        dist.all_reduce(tensor)
        return tensor

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in the order of ranks. They must be picklable."""
        if self.world_size == 1:
            return [value]
        gathered: list[T | None] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered  # type: ignore[return-value]

    def require_same_weights(self, digest: object) -> None:
        """Check that the model has the same weights on every rank; see :meth:`require_same`.

        Args:
            digest: of this rank's weights.

        Raises:
            ValueError: on every rank, if they differ.
        """
        advice = (
            "Each process makes the model itself, and all must make the same: call lightning.seed_everything(seed)"
            " before the model is made, or load the same checkpoint in all"
        )
        self.require_same(digest, "the model has other weights", advice)

    def require_same(self, digest: object, what: str, advice: str) -> None:
        """Check that something is the same on all ranks. All of them call this.

        Args:
            digest: of what this rank has.
            what: how the error begins, such as "the model has other weights".
            advice: what to do then, for the error.

        Raises:
            ValueError: on every rank, if digests differ.
        """
        found = self.gather(digest)
        if found.count(found[0]) < len(found):
            differing = next(rank for rank, other in enumerate(found) if other != found[0])
            raise ValueError(f"{what} on rank {differing} than on rank 0. {advice}")

    def all_true(self, condition: bool) -> bool:
        """Whether the condition holds on every rank."""
        return bool(self.sum(torch.tensor(int(condition))) == self.world_size)
