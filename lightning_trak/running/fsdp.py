"""Parameters and modules that FSDP2 (``fully_shard``) has split over ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank may hold only a part of the tensor (a DTensor)."""
    if not dist.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def shard_like(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has whole. Ranks do not communicate.

    Args:
        whole: the tensor.
        like: a tensor of the same shape. The result is sharded like it; if it is not sharded, the result is ``whole``.
    """
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    assert isinstance(like, DTensor)
    everywhere = [Replicate()] * like.device_mesh.ndim
    split = DTensor.from_local(whole.to(like.device), like.device_mesh, everywhere, run_check=False).redistribute(
        placements=like.placements
    )
    # The part may be a view, which would keep the whole tensor in memory.
    return DTensor.from_local(
        split.to_local().clone(), like.device_mesh, like.placements, shape=whole.shape, stride=split.stride()
    )


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a gradient over all ranks.

    FSDP2 has already averaged a sharded gradient, so its parts are joined. A plain tensor is averaged in place. All
    ranks must call this.
    """
    if is_sharded(tensor):
        whole: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
        return whole
    dist.all_reduce(tensor)
    return tensor.div_(dist.get_world_size())


def reshard(module: nn.Module) -> None:
    """Shard the parameters again. A forward pass without a backward pass may leave them whole."""
    from torch.distributed.fsdp import FSDPModule

    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def own_type(module: nn.Module) -> type[nn.Module]:
    """The module's type as its author wrote it, because ``fully_shard`` replaces it by a subclass."""
    kind = type(module)
    if dist.is_available():
        from torch.distributed.fsdp import FSDPModule

        if issubclass(kind, FSDPModule):
            return kind.__mro__[2]
    return kind
