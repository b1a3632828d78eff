"""Scores of several methods that ask the same question, as one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_trak.checks import require_tensor


def combine_scores(scores: Tensor, others: Tensor) -> Tensor:
    """Let scores count more where those of another method agree.

    For each target, the others are fitted to the scores: scores_i is about a + b others_i, by least squares over the
    training examples, with b >= 0. The result is the mean of the scores and of this fit. With scores in standard units,
    the others count r times as much as the scores, where r is their correlation; so others that have nothing in common
    with the scores change nothing of their order. Each target is treated alone.

    Meant for :class:`~lightning_trak.methods.ExactKernel` or :class:`~lightning_trak.TRAK` as the first, and
    ``Metagradient(..., order="average")`` of the same model as the second, for questions about other seeds. For models
    of halves of the data, give it ``first_steps=`` half of the steps: these models take no more. A metagradient of a
    run that is not smooth has little in common with the first, and so does little harm.

    Args:
        scores: shape ``(num_targets, num_train)``.
        others: the same shape, with the same sign: positive if more of the example raises the output.

    Returns:
        float64 on the CPU, ``(num_targets, num_train)``, in the unit of ``scores``. Where the two disagree, they are
        smaller.

    Raises:
        TypeError: if an argument is not a tensor of real numbers.
        ValueError: if shapes differ or are empty, or a number is not finite.

    Example:
        >>> scores = torch.tensor([[0.0, 1.0, 2.0]])
        >>> combine_scores(scores, 10 * scores + 5).round(decimals=6)
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


def combine_runs(scores: Sequence[Tensor], *others: Sequence[Tensor]) -> Tensor:
    """Add up scores of several methods, so that they predict the scores at a run that is left out.

    The result is sum_k b_k (mean of method k over the runs). The weights b_k >= 0 are the same for all targets. They
    need no ground truth: for each run, sum_k b_k (mean of method k over the other runs) is fitted to the first method's
    scores at this run, by least squares over training examples and targets, all runs together. So what is peculiar to
    a run counts little. All targets count the same: the scores to predict are centred, and have the norm 1.

    Meant for questions about other seeds. The first method is ``Metagradient(..., order="average")`` at each of some
    runs, for models of halves of the data with ``first_steps=`` half of the steps. The others are the same with
    ``last_steps=`` a tenth of these steps, and :class:`~lightning_trak.methods.ExactKernel` or
    :class:`~lightning_trak.TRAK` at the end of each run.

    Args:
        scores: of the first method, at each run ``(num_targets, num_train)``. Two runs at least, with other seeds.
        others: those of other methods: of the same runs in the same order, and with the same sign.

    Returns:
        float64 on the CPU, ``(num_targets, num_train)``, in the unit of the first method.

    Raises:
        TypeError: if a method's scores are not a sequence of tensors of real numbers.
        ValueError: if there are fewer than two runs, shapes differ or are empty, a number is not finite, or no method
            predicts the first one's scores at another run.

    Example:
        >>> shared = torch.tensor([[1.0, 1.0, -2.0]])
        >>> own = torch.tensor([[1.0, -1.0, 0.0]])
        >>> scores = combine_runs([shared + own, shared - own], [shared, shared])
        >>> scores.round(decimals=6)
        tensor([[ 1.,  1., -2.]], dtype=torch.float64)
    """
    methods = [_of_runs(number, method) for number, method in enumerate((scores, *others))]
    for number, method in enumerate(methods):
        if method.shape != methods[0].shape:
            raise ValueError(
                f"method {number} has scores of the shape (runs, num_targets, num_train) {tuple(method.shape)}, method"
                f" 0 of {tuple(methods[0].shape)}; expected those of the same runs, targets and training examples"
            )
    if len(methods[0]) < 2:
        raise ValueError("there is one run; combine_runs needs two at least, and combine_scores takes scores of one")
    for run, own in enumerate(methods[0]):
        if any(own.equal(earlier) for earlier in methods[0][:run]):
            raise ValueError(f"run {run} has the same scores as an earlier one; expected runs with other seeds")
    sizes = [float(method.abs().max().clamp_min(torch.finfo(method.dtype).tiny)) for method in methods]
    means = torch.stack([method.div_(size).mean(0) for method, size in zip(methods, sizes, strict=True)])
    weights = _predicting([method.sub_(method.mean(2, keepdim=True)) for method in methods])
    if not weights.any():
        raise ValueError(
            "no method predicts the first one's scores at another run, so the runs have nothing in common: they may not"
            " be smooth (metasmoothness says so), or scores are in another order or have another sign"
        )
    return (sizes[0] * weights[:, None, None] * means).sum(0)


def _predicting(parts: list[Tensor]) -> Tensor:
    """The weights of :func:`combine_runs`, for centred scores of each method, ``(runs, num_targets, num_train)``."""
    products = torch.zeros(len(parts), len(parts), dtype=torch.float64)
    aims = torch.zeros(len(parts), dtype=torch.float64)
    for run, goal in enumerate(parts[0]):
        norms = goal.norm(dim=1, keepdim=True)
        norms = torch.where(norms > 1e-13, norms, torch.inf)  # targets whose scores are all equal say nothing
        means = torch.stack([(part.sum(0) - part[run]) / (len(part) - 1) / norms for part in parts]).flatten(1)
        aims += means @ (goal / norms).flatten()
        products += means @ means.T
    return _non_negative(products, aims)


def _non_negative(products: Tensor, aims: Tensor) -> Tensor:
    """The b >= 0 for which b' products b / 2 - b' aims is smallest: one after the other, until they stay."""
    rows, goals = products.tolist(), aims.tolist()
    weights = [0.0] * len(goals)
    for _ in range(10_000):
        before = list(weights)
        for k, row in enumerate(rows):
            if row[k] > 0:
                others = sum(entry * weight for entry, weight in zip(row, weights, strict=True)) - row[k] * weights[k]
                weights[k] = max(0.0, (goals[k] - others) / row[k])
        if all(abs(new - old) <= 1e-12 * new for new, old in zip(weights, before, strict=True)):
            break
    return torch.tensor(weights, dtype=aims.dtype)


def _of_runs(number: int, scores: Sequence[Tensor]) -> Tensor:
    """Scores of a method, ``(runs, num_targets, num_train)``."""
    if isinstance(scores, str) or not isinstance(scores, Sequence):
        raise TypeError(
            f"expected the scores of method {number} as a sequence, one tensor for each run, got a"
            f" {type(scores).__name__}"
        )
    if not scores:
        raise ValueError(f"there are no scores of method {number}; expected those of two runs at least")
    runs = [_checked(f"scores of method {number} at run {run}", own) for run, own in enumerate(scores)]
    if len({own.shape for own in runs}) > 1:
        raise ValueError(
            f"scores of method {number} have the shapes {[tuple(own.shape) for own in runs]} at its runs; expected"
            " those of the same targets and training examples"
        )
    return torch.stack(runs)


def _standardised(rows: Tensor) -> Tensor:
    """Rows of mean 0 and standard deviation 1; rows of one number, up to rounding, become 0."""
    rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    rows = rows - rows.mean(1, keepdim=True)
    deviation = rows.std(1, correction=0, keepdim=True)
    return torch.where(deviation > 1e-13, rows / deviation, 0.0)


def _checked(name: str, scores: Tensor) -> Tensor:
    require_tensor(name, scores)
    if scores.ndim != 2 or not scores.numel():
        raise ValueError(f"expected {name} of shape (num_targets, num_train), got {tuple(scores.shape)}")
    result = scores.detach().cpu().double()
    if not result.isfinite().all():
        row = int((~result.isfinite()).any(1).nonzero()[0])
        raise ValueError(f"{name} of target {row} are not finite; leave the target out")
    return result
