"""Inner products of training gradients with a few directions, without the gradients where that is cheaper."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_debug
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_trak.features.finiteness import require_finite
from lightning_trak.features.rows import Features
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.substitution import Substituted
from lightning_trak.methods.examples import Examples
from lightning_trak.methods.influence.passes import Passes
from lightning_trak.texts.messages import in_one_line

_TOGETHER = 32  # directions in one forward pass, in the memory of as many passes
_WRITE = 100  # to make one number of a gradient, and read it, costs as much as this many operations of a product


def gradient_products(
    passes: Passes, directions: Tensor, positions: Sequence[int] | None = None, examples: Examples | None = None
) -> Iterator[tuple[Sequence[int], Features]]:
    """Yield the inner products of training examples' gradients with directions, in place of the gradients.

    Few directions v take one forward-mode pass each, d f(z_i) / d theta . v (Pearlmutter 1994), and no gradient is
    formed. Many directions take the gradients, and a product. The cost decides, see :func:`break_even`. Before
    forward-mode products are used, those of two examples, drawn by the seed, are compared with their gradients. If they
    differ, or the model has no forward mode, the gradients are used. A log line says which, and why.

    Args:
        passes: the model at a checkpoint, and the training data.
        directions: shape ``(n, p)``.
        positions: positions of the training examples; default: all.
        examples: what takes the place of the training examples, if anything.

    Yields:
        Positions of some examples, with ``features`` of shape ``(len(positions), n)``: the products.

    Raises:
        ValueError: if a product is not finite.
    """
    examples = passes.train if examples is None else examples
    chosen = range(len(examples)) if positions is None else positions
    reason = _reason_for_gradients(passes, directions, examples)
    count = f"{len(directions)} target{'s' if len(directions) > 1 else ''}"
    if reason is None:
        rank_zero_debug(f"scores at {passes.where}: forward-mode products for {count}")
        done = 0
        for part, (batch, size) in passes.parts(examples, chosen):
            try:
                products = _forward_mode(passes, batch, size, directions)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # an error of the model itself comes again with gradients
                reason = f"forward mode fails: {in_one_line(error)}"
                break
            require_finite(products, torch.tensor(part), f"at {passes.where}")
            yield part, products
            done += len(part)
        chosen = chosen[done:]
    if reason is not None:
        rank_zero_debug(f"scores at {passes.where}: products with the examples' gradients for {count}: {reason}")
        for part, rows in passes.rows(examples, chosen):
            yield part, rows._replace(features=rows.features @ directions.T)


def break_even(passes: Passes) -> float:
    """The number of directions up to which forward-mode products are cheaper than gradients.

    With F operations for an example's forward pass and p parameters, T directions take F + 2 T F operations. Gradients
    take 3 F, and p numbers are written and read, each as slow as some hundred operations.
    """
    ((batch, size),) = passes.batches(passes.train, [range(min(2, len(passes.train)))])
    with passes.computing(), FlopCounterMode(display=False) as counter:
        passes.extractor().engine.outputs(ExampleBatch(batch, size, passes.layout))
    operations = counter.get_total_flops() / size
    return 1 + _WRITE * passes.size / (2 * operations) if operations else float("inf")


def _reason_for_gradients(passes: Passes, directions: Tensor, examples: Examples) -> str | None:
    """Why forward-mode products cannot be used, or cost more; None if they are right and cheap."""
    try:
        most = break_even(passes)
        if len(directions) > most:
            return f"forward mode is cheaper for up to {int(most)}"
        draw = random.Random(passes.key("forward mode"))
        audited = sorted(draw.sample(range(len(examples)), min(2, len(examples))))
        ((_, (batch, size)),) = passes.parts(examples, audited)
        found = _forward_mode(passes, batch, size, directions).features
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # an error of the model itself comes again with gradients
        return f"forward mode fails: {in_one_line(error)}"
    gradients = torch.cat([rows.features for _, rows in passes.rows(examples, audited)])
    allowed = passes.extractor().engine.rounding * gradients.norm(dim=1, keepdim=True) * directions.norm(dim=1)
    off = (found - gradients @ directions.T).abs() > allowed
    if off.any():
        return (
            f"the forward-mode product of example {audited[int(off.any(1).nonzero()[0])]} is not that of its gradient"
        )
    return None


def _forward_mode(passes: Passes, batch: Any, size: int, directions: Tensor) -> Features:
    """The products of a batch's gradients with directions, in place of features, and its scalars."""
    examples, engine = ExampleBatch(batch, size, passes.layout), passes.extractor().engine
    parameters = {name: parameter.detach() for name, parameter in passes.parameters.items()}

    def outputs(values: dict[str, Tensor]) -> Tensor:
        with Substituted((passes.parameters[name], value) for name, value in values.items()):
            return engine.outputs(examples)

    def along(tangents: dict[str, Tensor]) -> Any:
        return jvp(outputs, (parameters,), (tangents,))

    products = []
    with passes.computing(), sdpa_kernel(SDPBackend.MATH):
        for part in torch.split(directions, _TOGETHER):
            tangents = {name: rows.to(parameters[name]) for name, rows in passes.split(part).items()}
            values, changes = vmap(along, out_dims=(None, 0))(tangents)  # type: ignore[arg-type]
            products.append(changes.T)
        if values.shape != (size,):
            raise ValueError(f"the output has shape {tuple(values.shape)}, not ({size},)")
        loss_gradients, curvatures = passes.model.output.derivatives(values)
    columns = torch.cat(products, dim=1), values, loss_gradients, curvatures
    return Features(*(column.to(passes.dtype) for column in columns))
