"""How well any prediction could agree with outputs that are means over noisy retrainings."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_trak.checks import require_tensor
from lightning_trak.metrics.functional.ranking import rank_rows


def noise_ceiling(outputs: Tensor) -> Tensor:
    """The rank correlation that a perfect prediction is expected to reach with the seed-averaged outputs, per target.

    Two retrainings of the same subsets with different seeds agree less than perfectly; the mean r of the rank
    correlations of all pairs of seeds gives, by the Spearman-Brown formula (Spearman, 1910; Brown, 1910), the
    reliability K r / (1 + (K - 1) r) of the mean over K seeds. A noise-free prediction correlates with that mean as the
    square root of its reliability (Spearman, 1904). The formula is exact for Pearson's correlation; for ranks it was
    checked by simulation (targets of 20 to 100 subsets, 2 to 5 seeds). Averaged over 50 targets, it lies within about
    0.02 of the truth for Gaussian outputs whose ceiling exceeds 0.6, within 0.05 for ceilings of 0.3 to 0.5, and up to
    0.05 too high for heavy-tailed ones. A reliability below 0, possible by chance, counts as 0; below a ceiling of
    about 0.2 the average is therefore too high, by up to 0.15 (20 subsets, 2 seeds): such outputs need more seeds.

    Args:
        outputs: ``(num_targets, num_subsets, num_seeds)``, finite, with at least 3 subsets and 2 seeds.

    Returns:
        ``(num_targets,)`` float64 in [0, 1]; 0 where the seeds do not agree or all outputs are equal.

    Raises:
        ValueError: If the shape is another, subsets or seeds are too few, or an output is NaN.

    Example:
        >>> import torch
        >>> outputs = torch.tensor([[[1.0, 2.0], [2.0, 1.0], [3.0, 3.0], [4.0, 5.0]]])
        >>> noise_ceiling(outputs)
        tensor([0.9428], dtype=torch.float64)
    """
    require_tensor("outputs", outputs)
    if outputs.ndim != 3 or outputs.shape[1] < 3 or outputs.shape[2] < 2:
        raise ValueError(
            "Expected `outputs` of shape `(num_targets, num_subsets, num_seeds)` with at least 3 subsets and 2 seeds, "
            f"but got {tuple(outputs.shape)}. The noise is measured by retraining each subset more than once."
        )
    num_subsets, num_seeds = outputs.shape[1:]
    ranks = rank_rows(outputs.transpose(1, 2)) - (num_subsets + 1) / 2
    # a constant row normalises to 0, so its correlation with every other seed counts as 0
    directions = torch.nn.functional.normalize(ranks, dim=-1)
    pairs = directions.sum(dim=1).square().sum(dim=-1) - directions.square().sum(dim=(1, 2))
    agreement = (pairs / (num_seeds * (num_seeds - 1))).clamp(0, 1)
    return (num_seeds * agreement / (1 + (num_seeds - 1) * agreement)).sqrt()
