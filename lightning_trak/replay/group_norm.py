"""Group normalization in operations that can be differentiated twice for many cotangents at once."""

import torch.nn.functional as F
from torch import Tensor

from lightning_trak.replay.replaced_function import ReplacedFunction


def plain_group_norm() -> ReplacedFunction:
    """A mode in which ``F.group_norm`` is made of means and products.

    The second derivative of torch's own is wrong for many cotangents at once (torch 2.13), so that they would have to
    be computed one after the other.
    """
    return ReplacedFunction(F.group_norm, _group_norm)


def _group_norm(
    input: Tensor,  # as F.group_norm names it
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    groups = input.reshape(len(input), num_groups, -1)
    centered = groups - groups.mean(-1, keepdim=True)
    found = (centered * (centered.square().mean(-1, keepdim=True) + eps).rsqrt()).reshape(input.shape)
    channels = [-1] + [1] * (input.ndim - 2)
    if weight is not None:
        found = found * weight.view(channels)
    return found if bias is None else found + bias.view(channels)
