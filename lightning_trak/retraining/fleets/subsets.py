"""Random subsets of the training set."""

import math

import torch
from torch import Tensor

from lightning_trak.checks import integer, positive, real


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
    num_train, num_subsets = positive("num_train", num_train), positive("num_subsets", num_subsets)
    size = round(fraction * num_train) if 0 < real("fraction", fraction) < 1 else 0
    if not 0 < size < num_train:
        raise ValueError(
            f"expected a fraction in (0, 1) such that a subset holds some of {num_train} examples and not all, got"
            f" {fraction}"
        )
    generator = torch.Generator().manual_seed(integer("seed", seed))
    return torch.stack([torch.randperm(num_train, generator=generator) < size for _ in range(num_subsets)])


def random_removals(num_train: int, num_subsets: int, fraction: float = 0.01, seed: int = 0) -> Tensor:
    """The training set without a small part, drawn uniformly and without replacement, again and again.

    No two parts are the same, since a rank correlation counts each subset once. The first subsets are the same however
    many are asked for. The global random state is neither read nor changed.

    Args:
        num_train: size of the training set.
        num_subsets: how many subsets.
        fraction: of the training set that each leaves out, in (0, 1): ``round(fraction * num_train)`` examples, and at
            least one.
        seed: of the draws.

    Returns:
        Bool ``(num_subsets, num_train)``, false where an example is left out.

    Raises:
        ValueError: if there is no subset to draw, it would be empty, or there are not as many different ones.
    """
    num_train, num_subsets = positive("num_train", num_train), positive("num_subsets", num_subsets)
    size = max(1, round(fraction * num_train)) if 0 < real("fraction", fraction) < 1 else 0
    if not 0 < size < num_train:
        raise ValueError(f"expected a fraction in (0, 1) that leaves some of {num_train} examples, got {fraction}")
    if num_subsets > math.comb(num_train, size):
        raise ValueError(
            f"expected different subsets, and there are {math.comb(num_train, size)} ways to remove {size} of"
            f" {num_train} examples; got num_subsets={num_subsets}"
        )
    generator = torch.Generator().manual_seed(integer("seed", seed))
    removed: dict[tuple[int, ...], None] = {}
    while len(removed) < num_subsets:
        drawn = torch.randperm(num_train, generator=generator)[:size]
        removed.setdefault(tuple(drawn.sort().values.tolist()))
    return torch.ones(num_subsets, num_train, dtype=torch.bool).scatter_(1, torch.tensor([*removed]), False)


def checked_masks(masks: Tensor, num_train: int) -> Tensor:
    """A copy of masks that a user gives, on the CPU.

    Raises:
        ValueError: if they are not subsets of the training set, each with an example.
    """
    if isinstance(masks, Tensor) and masks.dtype == torch.bool and masks.ndim == 2 and masks.shape[1] == num_train:
        sizes = masks.sum(1).tolist()
        if sizes and min(sizes):
            return masks.cpu().clone()
        received = f"subsets of sizes {sizes[:5]}"
    elif isinstance(masks, Tensor):
        received = f"{str(masks.dtype).removeprefix('torch.')} of shape {tuple(masks.shape)}"
    else:
        received = type(masks).__name__
    raise ValueError(
        f"masks must be bool of shape (num_subsets, {num_train}), the size of the training set, each subset with an"
        f" example; got {received}"
    )
