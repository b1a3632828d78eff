"""Checks an output before long work: it must depend only on the copy of the model and on its own example."""

from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_trak.features.model import ModelCopy
from lightning_trak.gradients import LoopEngine
from lightning_trak.gradients.audit import require_independent
from lightning_trak.gradients.batch import ExampleBatch, Layout
from lightning_trak.gradients.trials import require_repeatable
from lightning_trak.running.data.singles import Singles


def require_sound(model: ModelCopy, layout: Layout | None, twice: Any, *others: Any) -> None:
    """Check that the output of an example depends only on the copy of the module, and on no other example.

    What the output finds suspicious is warned of.

    Args:
        model: the model copy, at a checkpoint.
        layout: which parts of a batch belong to single examples.
        twice: a batch that holds the first example twice.
        others: a batch that holds another example twice, and a batch of both examples, which is in
            :class:`~lightning_trak.running.data.singles.Singles` if it cannot be taken apart. Without them the second check
            is left out.

    Raises:
        ValueError: if the output depends on anything else.
    """
    loop = LoopEngine(model.module, model.output, model.names)
    with model.differentiable():
        batches = [
            ExampleBatch(batch, len(batch) if isinstance(batch, Singles) else 2, layout) for batch in (twice, *others)
        ]
        first = loop.sound(batches[0], 0, model.original)
        what = f"the output of {type(model.module).__name__}"
        require_repeatable(lambda: loop.alone(batches[0], 0).detach(), what, first)
        suspicion = loop.suspicion(batches[0].take([0]))
        if suspicion:
            rank_zero_warn(suspicion)
        if not others or not first.isfinite().all():
            return  # another check refuses outputs that are not finite
        alone = torch.cat([first, loop.alone(batches[1], 0)])
        require_independent(loop, batches[2], alone, f"the first example {model.place}")
