"""A direction in a layer's activations, such as that of a probe or of a feature, as the output of targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_trak.checkpoints.names import canonical_name
from lightning_trak.checks import require_one_of
from lightning_trak.outputs.batches import Forward, call_module
from lightning_trak.outputs.margins import nan_unless
from lightning_trak.outputs.surrogate import SurrogateOutput

Pool = Literal["mean", "last"] | Callable[[Tensor, Any], Tensor]


class DirectionOutput(SurrogateOutput):
    r"""How far a layer's activations point in a direction: :math:`f = \langle w, \mathrm{pool}(h) \rangle`.

    h is what a submodule returns, and w the direction of a linear probe, of a feature of a dictionary, or of a concept
    (Kim et al. 2018, arXiv 1711.11279). A score says which training examples turned the activations of a target that
    way. f is in the unit of ``w``: divide it by its norm for the length of the projection.

    Training does not act on f, so it is an output of targets alone; the output of training examples is another one.

    Args:
        layer: name of a submodule that is called once in a forward pass, as in ``model.named_modules()``. It returns
            the activations: a tensor, or a tuple or list that begins with them.
        direction: w: of shape ``(width,)``, or of the shape of one example's activations for their inner product.
        pool: what becomes of the positions in activations of more dimensions than w: ``"mean"`` over them, or the
            ``"last"`` of a text. For texts, of shape ``(batch, length, width)``, the positions are those in the
            batch's ``attention_mask``, all if it has none. For maps, of shape ``(batch, width, *positions)`` with two
            or more dimensions of positions, all count. A function ``(activations, batch) -> (batch, width)`` pools in
            another way.
        forward: ``(module, batch) -> anything``, runs the model on a batch. Default: the module is called on a
            mapping's items as keywords, on a tuple's elements in order, or on a tensor.

    Example:
        >>> probe = torch.randn(8, generator=torch.Generator().manual_seed(0))
        >>> output = DirectionOutput("encoder.layer.3", probe, pool="last")
    """

    for_targets = True

    def __init__(self, layer: str, direction: Tensor, pool: Pool = "mean", forward: Forward | None = None) -> None:
        if not isinstance(direction, Tensor) or direction.ndim == 0 or not direction.is_floating_point():
            received = type(direction).__name__
            if isinstance(direction, Tensor):
                received = f"{direction.dtype} of shape {tuple(direction.shape)}"
            raise ValueError(f"expected direction as a Tensor of floats of shape (width,), received {received}")
        if not bool(direction.isfinite().all()) or not bool(direction.any()):
            raise ValueError("expected a direction of finite numbers that are not all zero")
        if not callable(pool):
            require_one_of("pool", pool, ("mean", "last"))
        self.layer = layer
        self.direction = direction.detach().clone()
        self.pool = pool
        self.forward = forward

    def output(self, module: nn.Module, batch: Any) -> Tensor:
        """The inner product of each example's activations with the direction, shape ``(batch,)``.

        Raises:
            ValueError: if the layer is not there, or not called exactly once, or its activations do not fit the
                direction or the mask.
            TypeError: if the layer returns no tensor.
        """
        activations = self._activations(module, batch)
        activations = activations.to(torch.promote_types(activations.dtype, torch.float32))
        if callable(self.pool):
            activations = self.pool(activations, batch)
        elif activations.shape[1:] != self.direction.shape:
            activations = self._pooled(activations, batch)
        if activations.shape[1:] != self.direction.shape:
            raise ValueError(
                f"expected activations of shape {('batch', *self.direction.shape)}, for the direction, from layer"
                f" {self.layer!r}, received {tuple(activations.shape)} after pooling"
            )
        return (activations * self.direction.to(activations)).flatten(1).sum(1)

    def explain_nan(self, module: nn.Module, batch: Any) -> str | None:
        """Says that no position is in the mask, if so."""
        del module
        mask = _mask(batch)
        if mask is None or bool(mask.any()):
            return None
        return "none of its positions is in attention_mask; leave it out of the dataset"

    def _activations(self, module: nn.Module, batch: Any) -> Tensor:
        """What the layer returns in a forward pass, with its graph."""
        names = {canonical_name(name): part for name, part in module.named_modules()}
        if self.layer not in names:
            raise ValueError(
                f"layer {self.layer!r} is no module of {type(module).__name__}, which has:"
                f" {', '.join(filter(None, names))}"
            )
        found: list[Tensor] = []

        def note(_: nn.Module, args: Any, result: Any) -> None:
            del args
            first = result[0] if isinstance(result, (tuple, list)) and result else result
            if not isinstance(first, Tensor):
                raise TypeError(
                    f"layer {self.layer!r} returned a {type(result).__name__}; expected a Tensor, or a tuple that"
                    " begins with one: name another layer"
                )
            found.append(first.clone())  # later layers may change it in place

        handle = names[self.layer].register_forward_hook(note)
        try:
            if self.forward is None:
                call_module(module, batch)
            else:
                self.forward(module, batch)
        finally:
            handle.remove()
        if len(found) != 1:
            raise ValueError(
                f"layer {self.layer!r} is called {len(found)} times in a forward pass; name one that is called once"
            )
        return found[0]

    def _pooled(self, activations: Tensor, batch: Any) -> Tensor:
        """One vector for each example."""
        if activations.ndim > 3 and self.pool == "mean":
            return activations.flatten(2).mean(2)
        if activations.ndim != 3:
            raise ValueError(
                f"pool={self.pool!r} cannot reduce activations of shape {tuple(activations.shape)} of layer"
                f" {self.layer!r} to the direction's shape {tuple(self.direction.shape)}: give pool as a function of"
                " (activations, batch)"
            )
        mask = _mask(batch)
        if mask is None:
            return activations.mean(1) if self.pool == "mean" else activations[:, -1]
        if mask.shape != activations.shape[:2]:
            raise ValueError(
                f"layer {self.layer!r} returned activations of shape {tuple(activations.shape)}, for which"
                f" attention_mask should have shape {tuple(activations.shape[:2])}, not {tuple(mask.shape)}: give pool"
                " as a function of (activations, batch)"
            )
        present = mask != 0
        if self.pool == "last":
            following = present.flip(1).cumsum(1).flip(1)  # how many present positions begin here
            present = present & (following == 1)
        some = present.any(1, keepdim=True)
        # Selected: a position that does not count may hold anything.
        kept = torch.where((present | ~some).unsqueeze(-1), activations, 0.0)
        return kept.sum(1) / present.sum(1, keepdim=True) * nan_unless(some)


def _mask(batch: Any) -> Tensor | None:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) else None
