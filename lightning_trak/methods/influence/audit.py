"""Some examples of a dataset, looked at closely before many passes are spent on all of it."""

import copy
import random
from typing import Any

import torch
from torch import Tensor, nn

from lightning_trak.gradients.batch import slice_batch
from lightning_trak.gradients.leaves import require_own_leaves
from lightning_trak.gradients.soundness import require_repeatable, trying
from lightning_trak.methods.examples import Examples
from lightning_trak.methods.influence.passes import Passes
from lightning_trak.outputs.evaluating import modules_of


def audit(passes: Passes, examples: Examples, original: nn.Module) -> None:
    """Compare outputs and gradients of two examples, drawn by the seed, with those of each alone by plain autograd.

    Args:
        passes: the model at a checkpoint.
        examples: the dataset.
        original: the user's module.

    Raises:
        ValueError: if outputs depend on chance, on other weights than those of the model's copy or on the rest of the
            batch, or gradients are others than autograd's, naming example and parameters.
    """
    total = len(examples)
    positions = sorted(random.Random(passes.key("audit")).sample(range(total), min(2, total)))
    ((batch, size),) = passes.batches(examples, [positions])
    extractor = passes.extractor
    what = f"the output of {type(extractor.module).__name__}"

    def values(batch: Any) -> Tensor:
        return extractor.output.output(extractor.module, copy.deepcopy(batch))

    with trying(original, extractor.module), passes.differentiable():
        found = require_repeatable(lambda: values(batch).detach(), what)
    with trying(original, extractor.module), passes.differentiable():
        require_own_leaves(values(batch), extractor.module, *modules_of(extractor.output))
        try:
            alone = torch.cat([values(slice_batch(batch, size, i, i + 1)) for i in range(size)])
            said = f"{float(found[0]):.5g} for example {positions[0]} beside another one, {float(alone[0]):.5g} alone"
        except (RuntimeError, ValueError) as error:
            alone, said = found * torch.nan, f"of one example alone it is an error ({error})"
        tolerance = 1e-3 * float(found.nan_to_num().abs().max())
        if not torch.allclose(alone, found, rtol=1e-3, atol=tolerance, equal_nan=True):  # NaN is refused with its name
            raise ValueError(
                f"{what} depends on the rest of the batch: {said}. Influence functions need an output of each example"
                " by itself: use batch normalisation with running statistics, and for losses that compare the examples"
                " of a batch lightning_trak.outputs.ContrastiveMargin"
            )
        expected = [
            torch.autograd.grad(value, list(passes.parameters.values()), retain_graph=True, allow_unused=True)
            for value in alone
        ]
    with passes.computing():
        rows = passes.split(extractor(copy.deepcopy(batch), torch.tensor(positions)).features)
    for i, position in enumerate(positions):
        _require_equal(
            {name: part[i] for name, part in rows.items()},
            dict(zip(passes.parameters, expected[i], strict=True)),
            f"example {position} at {passes.where}",
        )


def _require_equal(found: dict[str, Tensor], expected: dict[str, Tensor | None], where: str) -> None:
    dense = {
        name: torch.zeros_like(found[name]) if part is None else part.to_dense() for name, part in expected.items()
    }
    whole = sum(float(part.norm()) ** 2 for part in dense.values()) ** 0.5
    wrong = {
        name: float(error)
        for name, part in dense.items()
        if (error := (found[name] - part).norm()) > 1e-2 * part.norm() + 1e-4 * whole
    }
    if wrong:
        worst = max(wrong, key=lambda name: wrong[name])
        raise ValueError(
            f"the gradient of {where} is another one in a batch than by autograd for the example alone: {len(wrong)}"
            f" parameters are off, {worst} the most, by {wrong[worst]:.3g} where its gradient has norm"
            f" {float(dense[worst].norm()):.3g}; leave these parameters out by parameters=, and report it"
        )
