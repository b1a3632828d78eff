"""The derivative of the optimizer's update.

The update maps weights, moments and the gradient to the next weights and moments. For most optimizers, each number of
the results depends on the same number of these tensors alone. Then the derivative is a tensor for each pair of them,
and going back for many targets is a product with these tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_trak.replay.clipping import clipped
from lightning_trak.replay.player import Player
from lightning_trak.replay.products import Products
from lightning_trak.replay.records import StepRecord
from lightning_trak.replay.states import TrainingState

# Cotangents of targets, each (num_targets, *shape), by the names of TrainingState.tensors() and "gradient/NAME". Those
# missing are zero. They are changed in place: to allocate new ones takes longer than to compute them.
Cotangents = dict[str, Tensor]

# The name of a result, and its derivative: a tensor, or one number for all elements.
Term = tuple[str, Tensor | float]

# Numbers of as many targets as fit in this size are multiplied at once, so that they stay in the processor's cache.
_CACHED_BYTES = 1 << 19


@dataclass(frozen=True)
class Update:
    """The update of a step, with its graph.

    Attributes:
        gradients: the gradients before clipping, leaves, by the names of parameters.
        clipped: these gradients after clipping.
        inputs: for each parameter the leaves that its update starts from, by the names of cotangents.
        outputs: for each parameter the results, by the names of cotangents.
        elementwise: whether each number of the results depends on the same number of the inputs alone.
    """

    gradients: dict[str, Tensor]
    clipped: dict[str, Tensor]
    inputs: dict[str, dict[str, Tensor]]
    outputs: dict[str, dict[str, Tensor]]
    elementwise: bool

    @classmethod
    def of(cls, player: Player, record: StepRecord, before: TrainingState, sums: Mapping[str, Tensor]) -> Update:
        """The update of a step.

        Args:
            player: has the module, with the weights before the step.
            record: the step.
            before: the state before it.
            sums: the gradient of each parameter, before clipping.
        """
        step = player.update
        inputs: dict[str, dict[str, Tensor]] = {}
        outputs: dict[str, dict[str, Tensor]] = {}
        with torch.inference_mode(False), torch.enable_grad():
            gradients = {name: gradient.detach().requires_grad_() for name, gradient in sums.items()}
            bounded = clipped(gradients, record.settings.clip, record.settings.clip_by)
            for names, group in zip(record.structure.groups, record.settings.groups, strict=True):
                for name in names:
                    if name not in bounded:
                        continue
                    gradient = bounded[name].detach().requires_grad_()
                    parameter, kept = player.parameters[name], dict(before.moments.get(name, {}))
                    inputs[name] = {f"gradient/{name}": gradient, f"parameter/{name}": parameter}
                    for key in step.moments:
                        if key in kept:
                            leaf = kept[key].to(player.device).detach().requires_grad_()
                            kept[key] = inputs[name][f"moment/{name}/{key}"] = leaf
                    new, moments = step.update(parameter, gradient, kept, group)
                    outputs[name] = {f"parameter/{name}": new}
                    outputs[name] |= {f"moment/{name}/{key}": moment for key, moment in moments.items()}
        return cls(gradients, bounded, inputs, outputs, step.elementwise)

    def back(self, cotangents: Cotangents, count: int, products: Products) -> None:
        """Go back through the update.

        Args:
            cotangents: derivatives of targets by the state after the step. They become derivatives by the gradients,
                before clipping, and by the state before the step, the gradients held fixed.
            count: the number of targets.
            products: multiplies cotangents by the derivatives of graphs.
        """
        # For a few targets, to find the numbers takes longer than to go through the graph.
        many = count > 1 + max(map(len, self.outputs.values()), default=0)
        known = self._multiply(cotangents, count) if self.elementwise and many else None
        if known is None:
            known = self._differentiate(cotangents, count, products)
        for key in {*_joined(self.inputs), *_joined(self.outputs)} - known:
            cotangents.pop(key, None)
        bounded = {name: after for name, after in self.clipped.items() if after is not self.gradients[name]}
        if bounded:
            leaves = [self.gradients[name] for name in bounded]
            keys = [f"gradient/{name}" for name in bounded]
            vectors = [cotangents.get(key) for key in keys]
            for rows, found in products.blocks(list(bounded.values()), leaves, vectors, count):
                _write(cotangents, keys, rows, found, count)

    def _differentiate(self, cotangents: Cotangents, count: int, products: Products) -> set[str]:
        """Go back by autograd. Returns the names of the inputs that have derivatives."""
        inputs, outputs = _joined(self.inputs), _joined(self.outputs)
        vectors = [cotangents.get(key) for key in outputs]
        known: set[str] = set()
        for rows, found in products.blocks(list(outputs.values()), list(inputs.values()), vectors, count):
            known |= _write(cotangents, list(inputs), rows, found, count)
        return known

    def _multiply(self, cotangents: Cotangents, count: int) -> set[str]:
        """Go back by products with the numbers of the derivative. Returns the same as :meth:`_differentiate`."""
        terms = self._terms(cotangents)
        results = _joined(self.outputs)
        changed = {key for key, found in terms.items() if not _is_identity(key, found)}
        for key in changed - cotangents.keys():
            leaf = _joined(self.inputs)[key]
            cotangents[key] = leaf.new_empty(count, *leaf.shape)
        for name, gradient in self.gradients.items():
            keys = [key for key in self.inputs[name] if key in changed]
            size = max(1, _CACHED_BYTES // max(1, gradient.nbytes))
            for start in range(0, count if keys else 0, size):
                rows = slice(start, min(start + size, count))
                sums = {key: _sum(terms[key], cotangents, rows) for key in keys if key in results}
                for key in keys:
                    if key not in results:  # no sum starts from it, so it can be written at once
                        _sum(terms[key], cotangents, rows, out=cotangents[key][rows])
                for key, total in sums.items():
                    cotangents[key][rows] = total
        return set(terms)

    def _terms(self, cotangents: Cotangents) -> dict[str, list[Term]]:
        """For each input that the results depend on: results with cotangents, and their derivatives by the input."""
        inputs = _joined(self.inputs)
        terms: dict[str, list[Term]] = {}
        for number in range(max(map(len, self.outputs.values()), default=0)):
            chosen = {}  # one result of each parameter, so that one pass finds the derivatives of all of them
            for name, outputs in self.outputs.items():
                for key, output in list(outputs.items())[number : number + 1]:
                    if key in cotangents and output.requires_grad:
                        chosen[name] = key, output
            if not chosen:
                continue
            results = [output for _, output in chosen.values()]
            ones = [torch.ones_like(result) for result in results]
            found = torch.autograd.grad(results, list(inputs.values()), ones, retain_graph=True, allow_unused=True)
            derivatives = dict(zip(inputs, found, strict=True))
            for name, (key, _) in chosen.items():
                for own in self.inputs[name]:
                    if (derivative := derivatives[own]) is not None:
                        terms.setdefault(own, []).append((key, _number(derivative)))
        return terms


def _joined(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {key: tensor for group in tensors.values() for key, tensor in group.items()}


def _number(derivative: Tensor) -> Tensor | float:
    """The number that all elements are, as in SGD; else the tensor. Products with a number take half of the time."""
    if not derivative.numel():
        return derivative
    low, high = derivative.aminmax()
    return float(low) if low == high else derivative


def _sum(terms: list[Term], cotangents: Cotangents, rows: slice, out: Tensor | None = None) -> Tensor:
    """Products of cotangents with the derivatives of their results, added up."""
    (first, derivative), *others = terms
    total = torch.mul(cotangents[first][rows], derivative, out=out)
    for key, derivative in others:
        if isinstance(derivative, float):
            total.add_(cotangents[key][rows], alpha=derivative)
        else:
            total.addcmul_(cotangents[key][rows], derivative)
    return total


def _is_identity(key: str, terms: list[Term]) -> bool:
    """Whether the derivative by an input is that by the result of the same name, as for weights that do not decay."""
    (result, derivative), *others = terms
    return result == key and not others and isinstance(derivative, float) and derivative == 1


def _write(cotangents: Cotangents, keys: list[str], rows: slice, found: list[Tensor | None], count: int) -> set[str]:
    """Write cotangents of some targets in their places. Returns the names of those that are known."""
    known = {key: part for key, part in zip(keys, found, strict=True) if part is not None}
    places = {tensor.data_ptr() for tensor in cotangents.values()}
    for key, part in known.items():
        if part.untyped_storage().data_ptr() in places:  # the view of another one, which may be changed before
            known[key] = part.clone()
    for key, part in known.items():
        if key not in cotangents:
            cotangents[key] = part.new_empty(count, *part.shape[1:])
        cotangents[key][rows] = part
    return set(known)
