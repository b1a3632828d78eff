"""How much each group of training examples counts, as a table."""

from torch import Tensor

from lightning_trak.checks import require_tensor
from lightning_trak.metrics.functional import bootstrap_interval
from lightning_trak.scoring.groups import Groups
from lightning_trak.texts.tables import Cell, Table


def shares_table(shares: Tensor, groups: Groups, confidence: float = 0.95, seed: int = 0) -> Table:
    """A table of the groups of training examples, those with the highest mean scores first.

    Args:
        shares: the result of ``score(..., train_groups=groups)`` for at least two targets, shape
            ``(num_targets, len(groups))``.
        groups: of the training examples.
        confidence: level of the bootstrap interval over targets.
        seed: of the bootstrap.

    Returns:
        For each group: its name, the number of its examples, the mean over targets of the sum of its scores with its
        interval, its share (the mean divided by the sum of the sizes of all means, so that shares have a sign and their
        sizes sum to 1; 0 if all means are zero), and the mean per example.

    Raises:
        ValueError: if there are fewer than two targets, another number of groups, or a score is not finite.
    """
    require_tensor("shares", shares)
    if shares.ndim != 2 or shares.shape[1] != len(groups):
        raise ValueError(f"expected scores of shape (num_targets, {len(groups)}), got {tuple(shares.shape)}")
    if len(shares) < 2:
        raise ValueError(f"an interval over targets needs at least two targets, got {len(shares)}")
    if not shares.isfinite().all():
        raise ValueError("some scores are NaN or infinite; score again")
    low, high = bootstrap_interval(shares.cpu().T, confidence, seed=seed).tolist()
    means = shares.cpu().double().mean(0)
    total = float(means.abs().sum()) or 1.0
    rows: list[tuple[Cell, ...]] = []
    for number in means.argsort(descending=True, stable=True).tolist():
        mean, size = float(means[number]), int(groups.sizes[number])
        name = str(groups.names[number])
        rows.append((name, size, mean, low[number], high[number], mean / total, mean / size))
    return Table(("group", "examples", "mean score", "low", "high", "share", "per example"), rows)
