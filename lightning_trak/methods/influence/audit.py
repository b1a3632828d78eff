"""Check a few examples of a dataset before many passes over all of it."""

from collections.abc import Sequence
from typing import Any, cast

import torch

from lightning_trak.features.checks.soundness import require_sound
from lightning_trak.features.engines import EngineName, following_engine
from lightning_trak.gradients.base import EngineError
from lightning_trak.methods.examples import Examples
from lightning_trak.methods.influence.passes import Passes
from lightning_trak.running.data.ranges import draw_audited


def audit(passes: Passes, examples: Examples) -> None:
    """Check the output of the first example, and compare two examples, drawn by the seed, with each alone by autograd.

    If the first engine gets a gradient wrong, the next one is used.

    Args:
        passes: the model at a checkpoint.
        examples: the dataset.

    Raises:
        ValueError: if outputs depend on chance, on other weights than those of the model's copy or on the rest of the
            batch, or gradients differ from autograd's, naming example and parameters.
    """
    ((pair, _),) = passes.batches(examples, [[0, 0]])
    with passes.computing():
        require_sound(passes.model, passes.layout, pair)
    for position in draw_audited(range(len(examples)), 2, passes.key("audit")):
        part = next(part for part in passes.cut(examples) if position in part)
        (batch, _), (twice, _) = passes.batches(examples, [part, [position] * 2])
        while not _agrees(passes, batch, part, {part.index(position): twice}):
            passes.use_engine(following_engine(cast(EngineName, passes.engine_name)))


def _agrees(passes: Passes, batch: Any, positions: Sequence[int], audited: dict[int, Any]) -> bool:
    """Whether the engine agrees with autograd; an error if no other engine is left."""
    try:
        with passes.computing():
            passes.extractor()(batch, torch.tensor(positions), audited)
    except EngineError:
        if passes.engine_name in (None, "loop"):
            raise
        return False
    return True
