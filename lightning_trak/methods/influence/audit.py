"""Check a few examples of a dataset before many passes over all of it."""

import random

import torch

from lightning_trak.features.engines import following_engine
from lightning_trak.gradients.base import EngineError
from lightning_trak.methods.examples import Examples
from lightning_trak.methods.influence.passes import Passes


def audit(passes: Passes, examples: Examples) -> None:
    """Compare two examples, drawn by the seed, with each alone by plain autograd.

    If the first engine gets a gradient wrong, the next one is used.

    Args:
        passes: the model at a checkpoint.
        examples: the dataset.

    Raises:
        ValueError: if outputs depend on chance, on other weights than those of the model's copy or on the rest of the
            batch, or gradients differ from autograd's, naming example and parameters.
    """
    total = len(examples)
    positions = sorted(random.Random(passes.key("audit")).sample(range(total), min(2, total)))
    ((batch, size),) = passes.batches(examples, [positions])
    while True:
        try:
            with passes.computing():
                passes.extractor()(batch, torch.tensor(positions), dict.fromkeys(range(size)))
            return
        except EngineError:  # noqa: PERF203
            if passes.engine_name in (None, "loop"):
                raise
            passes.use_engine(following_engine(passes.engine_name))
