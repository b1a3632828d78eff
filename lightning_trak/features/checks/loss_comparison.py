"""Compares the loss that an output declares with the loss that ``training_step`` returns."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_trak.features.model import ModelCopy
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.outputs import ModelOutput
from lightning_trak.outputs.evaluating import exact_attention, unchanged
from lightning_trak.outputs.margins import logistic_loss
from lightning_trak.outputs.predictions import SeveralPredictions
from lightning_trak.packages import is_a, overrides
from lightning_trak.running.random_states import isolated_random_states
from lightning_trak.running.ranks import is_one_of_several
from lightning_trak.running.training_step import silence, training_step_of
from lightning_trak.texts.printable import counted

_RELATIVE, _ABSOLUTE = 2e-2, 1e-4  # the losses of a sure model are all rounding


def warn_of_other_loss(model: ModelCopy, examples: ExampleBatch, together: int) -> None:
    """Warn if ``training_step`` minimizes another loss than that of the output.

    Another factor is no other loss: a mean and a sum, or a square and its half, give the same Newton step. Of several
    predictions for an example, such as its tokens, the cross-entropies are compared. Nothing is said where the two
    cannot be compared: if the output does not say what its loss is a mean of, if the step is random, fails without a
    training run or returns no number, or if there are several processes.

    Args:
        model: the copy of the model, at a checkpoint. Whatever the step does to its weights, they are loaded again.
        examples: some training examples.
        together: how many of them the model can take together.
    """
    module, output = model.module, model.output
    if examples.is_one_by_one or output.context_size or output.numbered:
        return
    if output.averages and not isinstance(output, SeveralPredictions):
        return
    if not is_a(module, L.LightningModule) or not overrides(module, "training_step", L.LightningModule):
        return
    if not module.automatic_optimization:
        return
    if is_one_of_several():
        return  # a step may wait for the other processes, and each comes here in its own time
    try:
        batches = [examples.take([0]), examples.take([examples.size - 1])]
        if together > 1:
            batches.append(examples.take(slice(0, together)))
        losses, returned = _compared(model, module, batches)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception:  # the step may need anything that only a training run has
        return
    finally:
        model.load(model.checkpoint or 0, model.device)
    if not any(_proportional(returned, reduced) for reduced in zip(*losses, strict=True)):
        name = type(output).__name__
        pairs = "; ".join(
            f"{step:.4g} and {loss.mean:.4g} for {counted(batch.size, 'training example')}"
            for batch, step, loss in zip(batches, returned, losses, strict=True)
        )
        rank_zero_warn(
            f"training_step of {type(module).__name__} minimizes another loss than that of {name}, from which scores"
            f" are made. In eval mode, the two are {pairs}. Class weights, label smoothing, another kind of loss or a"
            " second one do this, and scores leave them out. NegativeLoss takes any loss of each example, also one"
            " times a weight. If training_step only adds a penalty on the weights, ignore this warning"
        )


class _Losses(NamedTuple):
    """What a step may make of the losses of a batch: their mean or sum, or the mean over the predictions of all."""

    mean: float
    sum: float
    pooled: float


def _losses(output: ModelOutput, module: nn.Module, batch: Any) -> _Losses:
    if isinstance(output, SeveralPredictions):
        margins, weights = output.predictions(module, batch)
        each = logistic_loss(margins)
        losses, pooled = (weights * each).sum(-1), each[weights != 0].mean()
    else:
        losses = output.loss(output.output(module, batch))
        pooled = losses.mean()
    return _Losses(losses.mean().item(), losses.sum().item(), pooled.item())


def _compared(
    model: ModelCopy, module: L.LightningModule, batches: Sequence[ExampleBatch]
) -> tuple[list[_Losses], list[float]]:
    """The losses of each batch by the output, and what ``training_step`` returns for it.

    Raises:
        ValueError: if a loss is not finite, or the step returns no number, or another one the second time.
    """
    output = model.output
    with model.differentiable(), isolated_random_states(), unchanged(module, output), exact_attention():
        losses = [_losses(output, module, batch.fresh()) for batch in batches]
        if not all(math.isfinite(loss.sum) for loss in losses):
            raise ValueError("an example has no loss")  # another check names it
        silence(module)
        step = training_step_of(module)
        returned = [_number(step, batch) for batch in batches]
        if not math.isclose(_number(step, batches[-1]), returned[-1], rel_tol=1e-4):
            raise ValueError("training_step is random")
    return losses, returned


def _number(step: Callable[[Any, int], Tensor | None], batch: ExampleBatch) -> float:
    loss = step(batch.fresh(), 0)
    if loss is None or not math.isfinite(loss.item()):
        raise ValueError("training_step returns no number")
    return loss.item()


def _proportional(returned: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether some numbers are others times a factor, up to rounding."""
    total = math.fsum(expected)
    factor = max(0.0, math.fsum(returned) / total) if total > 0 else 0.0
    off = max(abs(one - factor * other) for one, other in zip(returned, expected, strict=True))
    return off <= _RELATIVE * max(map(abs, returned)) + _ABSOLUTE
