"""Group normalization in operations that can be differentiated twice for many cotangents at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override


class PlainGroupNorm(TorchFunctionMode):
    """A mode in which ``F.group_norm`` is made of means and products.

    The second derivative of torch's own is wrong for many cotangents at once (torch 2.13), so that they would have to
    be computed one after the other.
    """

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (_group_norm if func is F.group_norm else func)(*args, **(kwargs or {}))


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
