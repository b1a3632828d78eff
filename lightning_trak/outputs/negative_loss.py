"""Any loss as the attributed output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities.data import extract_batch_size
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor, nn

from lightning_trak.outputs.base import close
from lightning_trak.outputs.linear import LinearLossOutput

_told = WarningCache()  # gives each warning once


class NegativeLoss(LinearLossOutput):
    r"""The negative training loss, :math:`f = -l`, for models that have no margin: any task whose loss is per example.

    The loss is linear in f, so that Q = 1, and R is set to 1: see
    :class:`~lightning_trak.outputs.linear.LinearLossOutput`. Prefer an output with a curvature of its own where one
    exists.

    Args:
        loss_fn: ``(module, batch) -> losses`` of shape ``(batch,)``, not reduced over the batch. A scalar is taken for
            a batch of one example only, so that a mean loss will do for gradient engines that go one by one. In a
            weighted mean, such as with class weights, the weight of an example alone cancels.

    Example:
        >>> import torch.nn.functional as F
        >>> def loss(module, batch):
        ...     inputs, labels = batch
        ...     return F.cross_entropy(module(inputs), labels, reduction="none")
        >>> output = NegativeLoss(loss)
        >>> hugging_face = NegativeLoss(lambda module, batch: module(**batch).loss)
    """

    def __init__(self, loss_fn: Callable[[nn.Module, Any], Tensor]) -> None:
        # Other packages take a loss of outputs and labels here.
        if str(getattr(loss_fn, "__module__", "")).startswith("torch.nn."):
            name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
            raise TypeError(
                f"NegativeLoss calls loss_fn(module, batch), and {name} of torch takes outputs and labels: write a"
                " function that calls the module, such as lambda module, batch: F.cross_entropy(module(batch[0]),"
                " batch[1], reduction='none')"
            )
        self.loss_fn = loss_fn

    def output(self, module: nn.Module, batch: Any) -> Tensor:
        """The negative loss of each example, shape ``(batch,)``.

        Raises:
            ValueError: if ``loss_fn`` does not return one loss per example.
        """
        losses = self.loss_fn(module, batch)
        if isinstance(losses, Tensor) and losses.ndim == 0 and extract_batch_size(batch) == 1:
            losses = losses.unsqueeze(0)
        if not isinstance(losses, Tensor) or losses.ndim != 1:
            received = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"expected loss_fn to return one loss per example, shape (batch,), received {received}; use"
                " reduction='none' and reduce over every dimension but the first"
            )
        return -losses.to(torch.promote_types(losses.dtype, torch.float32))

    def same_in_batch(self, module: nn.Module, batch: Any, alone: Tensor, tolerance: float) -> bool:
        """Whether losses in a batch are those of the examples alone; a loss that is reduced must be a mean or a sum."""
        losses = self.loss_fn(module, batch)
        if not isinstance(losses, Tensor) or losses.ndim != 0:
            return close(-losses, alone, tolerance)
        loss, total = float(losses.detach()), float(-alone.sum())
        slack = tolerance * (1 + abs(total))
        if min(abs(loss - total), abs(loss - total / len(alone))) <= slack:
            return True
        weighted = float(-alone.max()) - slack <= loss <= float(-alone.min()) + slack
        if weighted:
            _told.warn(
                "the loss of a batch is a weighted mean of its examples' losses, as with class weights, or with texts"
                " of different lengths. Of one example alone the weight cancels, so here all examples have the same"
                " weight: return one loss for each example, times its weight, if the weights should count"
            )
        return weighted
