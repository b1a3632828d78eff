"""The margin log p/(1 - p) of a label and the loss -log p as a function of it, right to rounding at any p."""

from __future__ import annotations

import torch
from torch import Tensor


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """Margin of each label: ``log p_y - log(1 - p_y)`` for p = softmax(logits).

    Computed as ``logit_y - logsumexp of the other logits``: forming 1 - p from p loses all digits as p nears 1.

    Args:
        logits: shape ``(..., classes)``, at least two classes.
        labels: class indices, shape ``(...)``, integers.

    Returns:
        Shape ``(...)``, float32 or better. NaN, with NaN gradients, where a label is outside ``0..classes - 1``.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    valid = (labels >= 0) & (labels < logits.shape[-1])
    index = torch.where(valid, labels, 0).long().unsqueeze(-1)
    own = logits.gather(-1, index).squeeze(-1).to(dtype)
    others = logits.scatter(-1, index, -torch.inf).to(dtype).logsumexp(-1)
    return (own - others) * nan_unless(valid)


def nan_unless(valid: Tensor) -> Tensor:
    """1 where ``valid``, else NaN: as a factor it marks an example that has no output, in value and in gradients.

    An exception would need the values of tensors, which ``vmap`` hides.
    """
    return torch.where(valid, 1.0, torch.nan)


def logistic_loss(margin: Tensor) -> Tensor:
    """``-log p = softplus(-margin)``, elementwise, with Q = 1 - p and R = p(1 - p) right to relative rounding.

    ``F.softplus`` and ``F.logsigmoid`` differentiate twice through 1 - sigmoid, which is zero in float32 from a margin
    of about 17 on (one of them on each side), where well-fitted examples lie: their Gram matrix would vanish.
    """
    positive = margin > 0
    magnitude = torch.where(positive, margin, -margin)  # not abs(): its slope at zero is zero
    return torch.where(positive, 0.0, -margin) + torch.exp(-magnitude).log1p()
