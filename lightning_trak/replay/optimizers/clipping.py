"""Gradient clipping as a function, which can be differentiated."""

from collections.abc import Mapping

import torch
from torch import Tensor


def clipped(gradients: Mapping[str, Tensor], bound: float, by: str) -> dict[str, Tensor]:
    """Clip gradients as ``torch.nn.utils`` does in place.

    Args:
        gradients: by the names of their parameters.
        bound: the bound; 0 for no clipping.
        by: ``"norm"`` bounds the norm of all gradients together, ``"value"`` each number.
    """
    if bound <= 0 or not gradients:
        return dict(gradients)
    if by == "value":
        return {name: gradient.clamp(-bound, bound) for name, gradient in gradients.items()}
    norm = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients.values()]).norm()
    scale = (bound / (norm + 1e-6)).clamp(max=1.0)
    return {name: gradient * scale for name, gradient in gradients.items()}
