"""Wrong labels: how to make some, and how soon a score of suspicion finds them."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_trak.checks import integer, real, require_tensor
from lightning_trak.texts.display import tuple_line


class DetectionCurve(NamedTuple):
    """Mislabelled examples found, against examples looked at in order of suspicion.

    Attributes:
        inspected: fraction of all examples looked at, from 0 to 1, float64 ``(points,)``.
        found: fraction of the mislabelled ones among them, float64 ``(points,)``.
        area: under the curve, float64 scalar: 1/2 is expected of random suspicion, and 1 - p/2 is the maximum, where p
            is the fraction of mislabelled examples.
        share: p, the fraction of mislabelled examples, float64 scalar.
    """

    inspected: Tensor
    found: Tensor
    area: Tensor
    share: Tensor

    def found_within(self, fraction: float) -> float:
        """The expected fraction of the mislabelled examples among the most suspicious ones.

        Args:
            fraction: of all examples, that is looked at, from 0 to 1.

        Raises:
            ValueError: If ``fraction`` is not from 0 to 1.

        Example:
            >>> import torch
            >>> flags = torch.tensor([0, 1, 1, 0]).bool()
            >>> suspicion = torch.tensor([0.1, 3.0, 0.2, 2.0])
            >>> mislabel_detection_curve(suspicion, flags).found_within(0.25)
            0.5
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"Expected `fraction` from 0 to 1, but got {fraction}.")
        inspected, found = self.inspected.tolist(), self.found.tolist()
        end = max(1, bisect_left(inspected, fraction))  # the curve is a line from the point before this one to it
        step = (fraction - inspected[end - 1]) / (inspected[end] - inspected[end - 1])
        return float(found[end - 1] + step * (found[end] - found[end - 1]))

    def __repr__(self) -> str:
        return tuple_line(self)


def mislabel_detection_curve(suspicion: Tensor, mislabelled: Tensor) -> DetectionCurve:
    """How many of the wrong labels are found when examples are inspected in order of suspicion.

    Self-influence is the suspicion of Koh and Liang 2017 (arXiv 1703.04730, section 5.4) and of Pruthi et al. 2020
    (arXiv 2002.08484, section 4.1): the score of a training example at itself. Equally suspicious examples are
    inspected in a random order: the curve is its expectation, a straight line across them.

    Args:
        suspicion: ``(num_train,)``, the most suspicious highest.
        mislabelled: bool ``(num_train,)``, true where the label is wrong.

    Returns:
        The curve, which starts at (0, 0), and the area under it.

    Raises:
        ValueError: If shapes or dtype do not fit, a suspicion is NaN, or all labels are right or all wrong.

    Example:
        >>> import torch
        >>> suspicion = torch.tensor([0.1, 3.0, 0.2, 2.0])
        >>> wrong = torch.tensor([0, 1, 1, 0]).bool()
        >>> curve = mislabel_detection_curve(suspicion, wrong)
        >>> curve.found
        tensor([0.0000, 0.5000, 0.5000, 1.0000, 1.0000], dtype=torch.float64)
        >>> curve.area
        tensor(0.6250, dtype=torch.float64)
    """
    require_tensor("suspicion", suspicion)
    require_tensor("mislabelled", mislabelled)
    if suspicion.ndim != 1 or mislabelled.shape != suspicion.shape or mislabelled.dtype != torch.bool:
        raise ValueError(
            "Expected `suspicion` and a boolean `mislabelled` of one shape `(num_train,)`, but got "
            f"{tuple(suspicion.shape)} and {mislabelled.dtype} of {tuple(mislabelled.shape)}."
        )
    if suspicion.isnan().any():
        raise ValueError(f"Expected numbers as `suspicion`, but {int(suspicion.isnan().sum())} are NaN.")
    total = int(mislabelled.sum())
    if not 0 < total < len(mislabelled):
        raise ValueError(
            f"Expected some wrong labels and some right ones, but {total} of {len(mislabelled)} are wrong."
        )
    values, group = torch.unique(suspicion.detach(), return_inverse=True)  # in ascending order
    steps = torch.stack([torch.ones_like(mislabelled), mislabelled]).double()
    counts = steps.new_zeros(2, len(values)).index_add_(1, group, steps).flip(1).cumsum(1)
    inspected, found = torch.nn.functional.pad(counts, (1, 0)) / steps.sum(1, keepdim=True)
    return DetectionCurve(inspected, found, torch.trapezoid(found, inspected), mislabelled.double().mean())


def flip_labels(labels: Tensor, fraction: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Give some examples the label of another class, to see whether they are found.

    The examples are drawn uniformly, and for each a class uniformly from the other classes that occur. The global
    random state is neither read nor changed.

    Args:
        labels: class of each example, ``(num_train,)``, integers or booleans.
        fraction: of the examples that get a wrong label.
        seed: of the draws.

    Returns:
        The new labels, and bool ``(num_train,)``, true where they are wrong.

    Raises:
        ValueError: If there are fewer than two classes, or nothing would be flipped.

    Example:
        >>> import torch
        >>> right = torch.arange(20) % 4
        >>> labels, mislabelled = flip_labels(right, fraction=0.1)
        >>> int(mislabelled.sum()), bool((labels != right).eq(mislabelled).all())
        (2, True)
    """
    require_tensor("labels", labels)
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"Expected integer `labels` of shape `(num_train,)`, but got {labels.dtype} {labels.shape}.")
    classes, place = torch.unique(labels.cpu(), return_inverse=True)
    count = round(fraction * len(labels)) if 0 < real("fraction", fraction) <= 1 else 0
    if len(classes) < 2 or not count:
        raise ValueError(
            f"Expected labels to flip, but got {len(labels)} of {len(classes)} classes and `fraction` {fraction}."
        )
    generator = torch.Generator().manual_seed(integer("seed", seed))
    mislabelled = torch.randperm(len(labels), generator=generator) < count
    shift = torch.randint(1, len(classes), (len(labels),), generator=generator)
    wrong = classes[(place + shift) % len(classes)].to(labels.device)
    mislabelled = mislabelled.to(labels.device)
    return torch.where(mislabelled, wrong, labels), mislabelled
