"""Signs that a module returns probabilities where an output takes logits."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

# Operations that change the shape or the dtype of a tensor and not its numbers, as autograd names them.
_MOVES = re.compile(
    r"(Alias|Clone|Expand|Permute|Reshape|Select|Slice|Squeeze|T|ToCopy|Unsqueeze|UnsafeView|View)Backward"
)


def sums_to_one(logits: Tensor) -> bool:
    """Whether the numbers of each example, of shape ``(batch, classes)``, are what a softmax returns."""
    if logits.ndim != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
        return False
    rounding = 4 * torch.finfo(logits.dtype).eps
    return bool((logits >= 0).all() and ((logits.double().sum(1) - 1).abs() <= rounding).all())


def ends_in_sigmoid(logits: Tensor) -> bool:
    """Whether the last operation that made the numbers is a sigmoid. Their graph tells, not they themselves."""
    node = logits.grad_fn
    while node is not None and _MOVES.match(node.name()):
        node = node.next_functions[0][0]
    return node is not None and node.name().startswith("SigmoidBackward")


def takes_for_logits(module: nn.Module, output: object, inverse: str) -> str:
    """What to say of a module that returns probabilities.

    Args:
        module: the module.
        output: the output that takes logits.
        inverse: what makes logits of the probabilities.
    """
    name = type(output).__name__
    return (
        f"{type(module).__name__} returns probabilities, and {name} takes them for logits, of which it makes"
        f" probabilities again. Return logits, or pass {name}(forward=), a function (module, batch) that returns"
        f" {inverse} of the probabilities. If training takes them for logits, too, ignore this warning"
    )
