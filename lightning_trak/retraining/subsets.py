"""Random subsets of the training set."""

import torch
from torch import Tensor


def random_subsets(num_train: int, num_subsets: int, fraction: float = 0.5, seed: int = 0) -> Tensor:
    """Subsets of one size, each drawn uniformly and without replacement, independently of the others.

    The first subsets are the same however many are asked for. They use a generator of their own: the global random
    state is neither read nor changed.

    Args:
        num_train: size of the training set.
        num_subsets: how many.
        fraction: of the training set that a subset holds, in (0, 1); a subset has ``round(fraction * num_train)``
            examples. The linear datamodeling score's authors take a half (arXiv 2303.14186, section 2.2).
        seed: of the draws.

    Returns:
        Bool ``(num_subsets, num_train)``, true where the subset holds the example.

    Raises:
        ValueError: if there is no subset to draw, or a subset would be empty or everything.
    """
    if num_subsets < 1:
        raise ValueError(f"num_subsets must be at least 1, got {num_subsets}")
    size = round(fraction * num_train)
    if not 0 < size < num_train:
        raise ValueError(
            f"subsets of fraction {fraction} of {num_train} examples hold {size}; expected some and not all of them"
        )
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(num_train, generator=generator) < size for _ in range(num_subsets)])
