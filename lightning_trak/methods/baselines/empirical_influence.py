"""Empirical influence: outputs of models that were trained on an example minus outputs of those that were not."""

from torch import Tensor

from lightning_trak.methods.baselines.subsets import SubsetMethod


class EmpiricalInfluence(SubsetMethod):
    """By how much does the output at the target change if the training example is in the training set?

    A positive score says that training on the example raises the output at the target. The unit is that of the output:
    a score is the mean output over the subsets that hold the example minus the mean over those that do not (Feldman and
    Zhang 2020, arXiv 2008.03703, algorithm 1, of any output rather than of correctness).

    Args:
        masks: bool ``(num_subsets, num_train)``.
        outputs: ``(num_targets, num_subsets[, num_seeds])``, see
            :class:`~lightning_trak.methods.baselines.subsets.SubsetMethod`.

    Raises:
        ValueError: if an example is in all subsets or in none: then there is nothing to compare.

    Example:
        >>> import torch
        >>> masks = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1]]).bool()
        >>> EmpiricalInfluence(masks, torch.tensor([[3.0, 5.0, 6.0]])).estimate()
        tensor([[-2.0000, -0.5000,  2.5000]])
    """

    def __init__(self, masks: Tensor, outputs: Tensor) -> None:
        super().__init__(masks, outputs)
        counts = self.masks.sum(0)
        for kind, useless in (("all subsets", counts == len(masks)), ("no subset", counts == 0)):
            if useless.any():
                raise ValueError(
                    f"{int(useless.sum())} training examples are in {kind}, first {int(useless.nonzero()[0])}, so that"
                    " their influence is not defined: add subsets, or leave their columns out"
                )

    def estimate(self) -> Tensor:
        """The differences of means, ``(num_targets, num_train)``."""
        masks = self.masks.double()
        present = masks.sum(0)
        with_example = self.outputs @ masks
        without = self.outputs.sum(1, keepdim=True) - with_example
        return (with_example / present - without / (len(masks) - present)).float()
