"""Scores of two methods that ask the same question, as one."""

import torch
from torch import Tensor


def combine_scores(scores: Tensor, others: Tensor) -> Tensor:
    """Let scores count more where those of another method agree.

    For each target, the others are fitted to the scores: scores_i is about a + b others_i, by least squares over the
    training examples, with b >= 0. The result is the mean of the scores and of this fit. With scores in standard units,
    the others count r times as much as the scores, where r is their correlation; so others that have nothing in common
    with the scores change nothing of their order. Each target is treated alone.

    Meant for :class:`~lightning_trak.methods.ExactKernel` or :class:`~lightning_trak.TRAK` as the first, and
    ``Metagradient(..., order="average")`` of the same model as the second, for questions about other seeds. A
    metagradient of a run that is not smooth has little in common with the first, and so does little harm.

    Args:
        scores: shape ``(num_targets, num_train)``.
        others: the same shape, with the same sign: positive if more of the example raises the output.

    Returns:
        float64 on the CPU, ``(num_targets, num_train)``, in the unit of ``scores``. Where the two disagree, they are
        smaller.

    Raises:
        TypeError: if an argument is no tensor of real numbers.
        ValueError: if shapes differ or are empty, or a number is not finite.

    Example:
        >>> scores = torch.tensor([[0.0, 1.0, 2.0]])
        >>> combine_scores(scores, 10 * scores + 5)
        tensor([[0., 1., 2.]], dtype=torch.float64)
    """
    first, second = _checked("scores", scores), _checked("others", others)
    if first.shape != second.shape:
        raise ValueError(
            f"scores have the shape {tuple(first.shape)} and others {tuple(second.shape)}; expected scores of the same"
            " targets and the same training examples"
        )
    mean = first.mean(1, keepdim=True)
    first, second = first - mean, _standardised(second)
    slope = (first * second).mean(1, keepdim=True).clamp_min(0)
    return mean + (first + slope * second) / 2


def _standardised(rows: Tensor) -> Tensor:
    """Rows of mean 0 and standard deviation 1; rows of one number, up to rounding, become 0."""
    rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    rows = rows - rows.mean(1, keepdim=True)
    deviation = rows.std(1, correction=0, keepdim=True)
    return torch.where(deviation > 1e-13, rows / deviation, 0.0)


def _checked(name: str, scores: Tensor) -> Tensor:
    if not isinstance(scores, Tensor) or scores.is_complex():
        received = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"expected {name} as a tensor of real numbers, got {received}")
    if scores.ndim != 2 or not scores.numel():
        raise ValueError(f"expected {name} of shape (num_targets, num_train), got {tuple(scores.shape)}")
    result = scores.detach().cpu().double()
    if not result.isfinite().all():
        row = int((~result.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"{name} of target {row} are not finite; leave the target out")
    return result
