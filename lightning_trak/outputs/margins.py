"""The margin log p/(1 - p) and the loss -log p as functions of each other, right to rounding at any p."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """Margin of each label: ``log p_y - log(1 - p_y)`` for p = softmax(logits).

    Computed as ``logit_y - logsumexp of the other logits``: forming 1 - p from p loses all digits as p nears 1.

    Args:
        logits: shape ``(..., classes)``, at least two classes.
        labels: class indices, shape ``(...)``, integers.

    Returns:
        Shape ``(...)``, float32 or better. NaN, with NaN gradients, where a label is outside ``0..classes - 1``.
    """
    labels = labels.long()  # in uint8, 256 classes would be 0
    valid = (labels >= 0) & (labels < logits.shape[-1])
    own, others = _OwnAndOthers.apply(logits, torch.where(valid, labels, 0))  # type: ignore[no-untyped-call]
    margin: Tensor = (own - others) * nan_unless(valid)
    return margin


def binary_log_odds(logits: Tensor, labels: Tensor, counted: Tensor | None = None) -> Tensor:
    """Margin of each label 0 or 1, for ``p = sigmoid(logit)`` of label 1: the logit, or minus the logit.

    Args:
        logits: any shape.
        labels: of the same shape.
        counted: which labels count, bool of the same shape; default: all.

    Returns:
        The same shape, float32 or better. NaN, with NaN gradients, where a label that counts is neither 0 nor 1.
    """
    valid = (labels == 0) | (labels == 1)
    signs = torch.where(labels == 1, 1.0, -1.0) * nan_unless(valid if counted is None else valid | ~counted)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) * signs


class _OwnAndOthers(torch.autograd.Function):
    """The label's logit and the logsumexp of the others, a few rows at a time.

    Logits over a vocabulary are often the largest tensors of a language model. Nothing else of their size is made here
    but their gradient, where autograd would make ten.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Shapes ``(...)``, float32 or better, for logits ``(..., classes)`` and labels ``(...)``."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        owns, others = [], []
        for rows, index in _blocks(logits, labels):
            owns.append(rows.gather(1, index).to(dtype))
            others.append(rows.to(dtype).scatter(1, index, -torch.inf).logsumexp(1))
        return torch.cat(owns).view(labels.shape), torch.cat(others).view(labels.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        """Keep what the derivatives need."""
        ctx.save_for_backward(*inputs, output[1])
        ctx.save_for_forward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, own_slope: Tensor, others_slope: Tensor) -> tuple[Tensor, None]:
        """The softmax of the others times their slope, and the label's slope at its place."""
        logits, labels, others = ctx.saved_tensors
        # Made from a slope, so that a backward pass that is mapped over several slopes has one for each.
        gradient = others_slope.new_empty(logits.shape, dtype=logits.dtype)
        start = 0
        for rows, index, other, slope, own in _blocks(logits, labels, others, others_slope, own_slope):
            part = ((rows - other).exp_() * slope).scatter(1, index, own)
            gradient.view(-1, logits.shape[-1])[start : start + len(rows)] = part
            start += len(rows)
        return gradient, None

    @staticmethod
    def jvp(ctx: Any, change: Tensor, _: None) -> tuple[Tensor, Tensor]:
        """The change of the label's logit, and the mean change of the others by their softmax."""
        logits, labels, others = ctx.saved_tensors
        owns, means = [], []
        for rows, index, other, moved in _blocks(logits, labels, others, rows_like=change):
            owns.append(moved.gather(1, index).to(others.dtype))
            softmax = (rows.to(others.dtype) - other).exp().scatter(1, index, 0.0)
            means.append((softmax * moved).sum(1))
        return torch.cat(owns).view(labels.shape), torch.cat(means).view(labels.shape)


# Logits in a block: on a CPU they should stay in its cache, elsewhere kernels should be few.
_CPU_BLOCK, _ACCELERATOR_BLOCK = 1 << 17, 1 << 26


def _blocks(logits: Tensor, *columns: Tensor, rows_like: Tensor | None = None) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of logits ``(rows, classes)`` at a time, with what belongs to them, ``(rows, 1)`` each.

    ``rows_like`` is another tensor with the shape of the logits; its rows come last.
    """
    classes = logits.shape[-1]
    step = max(1, (_CPU_BLOCK if logits.device.type == "cpu" else _ACCELERATOR_BLOCK) // classes)
    table = [logits.reshape(-1, classes), *(column.reshape(-1, 1) for column in columns)]
    if rows_like is not None:
        table.append(rows_like.reshape(-1, classes))
    for start in range(0, len(table[0]), step):
        yield tuple(column[start : start + step] for column in table)


def nan_unless(valid: Tensor) -> Tensor:
    """1 where ``valid``, else NaN: as a factor it marks an example that has no output, in value and in gradients.

    An exception would need the values of tensors, which ``vmap`` hides.
    """
    return torch.where(valid, 1.0, torch.nan)


def logistic_loss(margin: Tensor) -> Tensor:
    """``-log p = softplus(-margin)``, elementwise, with Q = 1 - p and R = p(1 - p) right to relative rounding.

    ``F.softplus`` and ``F.logsigmoid`` differentiate twice through 1 - sigmoid, which is zero in float32 from a margin
    of about 17 on (one of them on each side), where well-fitted examples lie: their Gram matrix would vanish.
    """
    positive = margin > 0
    magnitude = torch.where(positive, margin, -margin)  # not abs(): its slope at zero is zero
    return torch.where(positive, 0.0, -margin) + torch.exp(-magnitude).log1p()


def token_log_likelihoods(logits: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """The log-likelihood of each label, 0 where it does not count; right to rounding also where p nears 1.

    Args:
        logits: shape ``(batch, length, vocabulary)``.
        labels: shape ``(batch, length)``.
        counted: which labels count, bool of the same shape.

    Returns:
        Shape ``(batch, length)``; NaN with NaN gradients for an example where none counts.
    """
    some = counted.any(-1, keepdim=True)
    kept = counted | ~some
    margins = log_odds(logits, torch.where(counted, labels, 0))
    # Selected before and after: a token that does not count may have an infinite margin.
    found = torch.where(kept, -logistic_loss(torch.where(kept, margins, 0.0)), 0.0)
    return found * nan_unless(some)


_CERTAIN = 20.0  # from this margin on, its loss is e^-margin (1 - e^-margin / 2) to rounding in float64


def pooled_margin(margins: Tensor, counted: Tensor, mean: bool = True) -> Tensor:
    """The margin whose logistic loss is the mean, or the sum, of the logistic losses of several margins.

    It is ``log p - log(1 - p)`` for p the geometric mean, or the product, of their probabilities. It is computed from
    logarithms of losses, since losses themselves underflow where all labels are certain.

    Args:
        margins: shape ``(batch, labels)``.
        counted: which of them count, bool of the same shape.
        mean: whether to take the mean, not the sum.

    Returns:
        Shape ``(batch,)``; NaN with NaN gradients where none counts.
    """
    some = counted.any(-1)
    kept = counted | ~some.unsqueeze(-1)
    # Selected before and after: a label that does not count may have an infinite margin.
    losses = torch.where(kept, _log_logistic_loss(torch.where(kept, margins, 0.0)), -torch.inf)
    total = losses.logsumexp(-1)
    if mean:
        total = total - kept.sum(-1).to(total.dtype).log()
    margin: Tensor = _margin_of(total) * nan_unless(some)
    return margin


def _log_logistic_loss(margin: Tensor) -> Tensor:
    """The logarithm of :func:`logistic_loss`, elementwise."""
    certain = margin > _CERTAIN
    tiny = torch.exp(-torch.where(certain, margin, _CERTAIN))
    return torch.where(certain, -margin - tiny / 2, logistic_loss(torch.where(certain, 0.0, margin)).log())


def _margin_of(log_loss: Tensor) -> Tensor:
    """The margin -log(e^l - 1) whose logistic loss l has this logarithm, elementwise."""
    certain = log_loss < -_CERTAIN
    tiny = torch.where(certain, log_loss, -_CERTAIN).exp()
    loss = torch.where(certain, 0.0, log_loss).exp()
    return torch.where(certain, -log_loss - tiny / 2, -loss - (-torch.expm1(-loss)).log())
