"""The derivative of the optimizer's update.

The update maps weights, moments and the gradient to the next weights and moments. For most optimizers, each number of
the results depends on the same number of these tensors alone. Then the derivative is a tensor for each pair of them,
and going back for many targets is a product with these tensors. Where the update is linear, they are single numbers.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_trak.replay.optimizers.base import Factors
from lightning_trak.replay.optimizers.clipping import clipped
from lightning_trak.replay.player import Player
from lightning_trak.replay.recording.records import StepRecord
from lightning_trak.replay.recording.states import TrainingState
from lightning_trak.replay.reverse.products import Products

# Cotangents of targets, each (num_targets, *shape), by the names of TrainingState.tensors(). Those missing are zero.
Cotangents = dict[str, Tensor]


class Block(NamedTuple):
    """Targets that go back through a step together, so that their cotangents stay in the processor's cache.

    Attributes:
        num_targets: how many they are.
        cotangents: their cotangents.
        factors: numbers that some cotangents of moments are still to be multiplied by. With momentum, a pass over the
            memory is saved.
    """

    num_targets: int
    cotangents: Cotangents
    factors: dict[str, float]

    def cut(self, size: int) -> list[Block]:
        """Blocks of at most ``size`` targets. They share memory with this one."""
        if self.num_targets <= size:
            return [self]
        return [
            Block(
                min(size, self.num_targets - start),
                {key: part[start : start + size] for key, part in self.cotangents.items()},
                dict(self.factors),
            )
            for start in range(0, self.num_targets, size)
        ]


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
        factors: of a linear update, in place of a graph, by the names of parameters.
        known: the numbers of the derivative that were found, by the names of the results that have cotangents.
    """

    gradients: dict[str, Tensor]
    clipped: dict[str, Tensor]
    inputs: dict[str, dict[str, Tensor]]
    outputs: dict[str, dict[str, Tensor]]
    elementwise: bool
    factors: dict[str, Factors]
    known: dict[frozenset[str], dict[str, list[Term]]] = field(default_factory=dict)

    @classmethod
    def of(cls, player: Player, record: StepRecord, before: TrainingState, sums: Mapping[str, Tensor]) -> Update:
        """The update of a step.

        Args:
            player: has the module, with the weights before the step.
            record: the step.
            before: the state before it.
            sums: the gradient of each parameter, before clipping.
        """
        optimizer = player.update
        inputs: dict[str, dict[str, Tensor]] = {}
        outputs: dict[str, dict[str, Tensor]] = {}
        factors: dict[str, Factors] = {}
        with torch.inference_mode(False), torch.enable_grad():
            gradients = {name: gradient.detach().requires_grad_() for name, gradient in sums.items()}
            bounded = clipped(gradients, record.settings.clip, record.settings.clip_by)
            for names, group in zip(record.structure.groups, record.settings.groups, strict=True):
                factors_of = functools.cache(functools.partial(optimizer.factors, group=group))
                for name in names:
                    if name not in bounded:
                        continue
                    kept = before.moments.get(name, {})
                    own = {"parameter": player.parameters[name], "gradient": bounded[name]}
                    own |= {key: kept[key].to(player.device) for key in optimizer.moments if key in kept}
                    own = {key: tensor.detach().requires_grad_(not optimizer.linear) for key, tensor in own.items()}
                    if optimizer.linear:
                        factors[name] = factors_of(frozenset(kept))
                        results = {key: _weighted_sum(own, terms) for key, terms in factors[name].items()}
                    else:
                        new, moments = optimizer.step(own["parameter"], own["gradient"], {**kept, **own}, group)
                        results = {"parameter": new, **moments}
                    inputs[name] = {_key(key, name): tensor for key, tensor in own.items()}
                    outputs[name] = {_key(key, name): tensor for key, tensor in results.items()}
        return cls(gradients, bounded, inputs, outputs, optimizer.elementwise, factors)

    def back(self, block: Block, products: Products) -> Cotangents:
        """Go back through the update.

        Args:
            block: targets, with their derivatives by the state after the step. They become derivatives by the state
                before the step, the gradients held fixed.
            products: multiplies cotangents by the derivatives of graphs.

        Returns:
            The derivatives by the gradients before clipping, by the names of parameters. The block's cotangents may
            share memory with them.
        """
        cotangents, count = block.cotangents, block.num_targets
        # For a few targets, to find the numbers takes longer than to go through the graph.
        many = count > 1 + max(map(len, self.outputs.values()), default=0)
        known = self.factors or (self.elementwise and many)
        found = self._multiply(block) if known else self._differentiate(block, products)
        gradients = {name: found.pop(key) for name in self.gradients if (key := f"gradient/{name}") in found}
        for key in {*_joined(self.inputs), *_joined(self.outputs)}:
            cotangents.pop(key, None)
        cotangents |= found
        bounded = {name: after for name, after in self.clipped.items() if after is not self.gradients[name]}
        leaves, vectors = [self.gradients[name] for name in bounded], [gradients.get(name) for name in bounded]
        return gradients | _collected(bounded, products.blocks(list(bounded.values()), leaves, vectors, count))

    def _differentiate(self, block: Block, products: Products) -> Cotangents:
        """Go back by autograd. Returns the derivatives by the inputs."""
        inputs, outputs = _joined(self.inputs), _joined(self.outputs)
        for key in block.factors.keys() & outputs.keys():
            block.cotangents[key].mul_(block.factors.pop(key))
        vectors = [block.cotangents.get(key) for key in outputs]
        blocks = products.blocks(list(outputs.values()), list(inputs.values()), vectors, block.num_targets)
        return _collected(inputs, blocks)

    def _multiply(self, block: Block) -> Cotangents:
        """The same by products with the numbers of the derivative. Cotangents are changed in place."""
        cotangents, count = block.cotangents, block.num_targets
        inputs, results = _joined(self.inputs), _joined(self.outputs)
        factors = {key: block.factors.pop(key) for key in block.factors.keys() & results.keys()}
        terms = {
            key: [(result, factor * factors.get(result, 1.0)) for result, factor in own]
            for key, own in self._terms(frozenset(cotangents)).items()
        }
        found = {
            key: cotangents[key] if key in cotangents else inputs[key].new_empty(count, *inputs[key].shape)
            for key in terms
        }
        for name, gradient in self.gradients.items():
            keys = [key for key in self.inputs[name] if key in terms and not _is_identity(key, terms[key])]
            first = f"gradient/{name}"
            for key in [key for key in keys if key.startswith("moment/")]:
                if (ratio := _ratio(terms[key], terms.get(first), gradient.dtype)) is not None:
                    keys.remove(key)  # its cotangents are those of the gradient, up to a factor
                    found[first], block.factors[key] = found[key], ratio
                    terms[first].sort(key=lambda term, kept=key: term[0] != kept)  # type: ignore[misc]
                    break
            size = max(1, _CACHED_BYTES // max(1, gradient.nbytes))
            for start in range(0, count if keys else 0, size):
                rows = slice(start, min(start + size, count))
                sums = {key: _sum(terms[key], cotangents, rows) for key in keys if key in results}
                for key in keys:
                    if key not in results:  # no other sum needs its memory, so it can be written at once
                        _sum(terms[key], cotangents, rows, out=found[key][rows])
                for key, total in sums.items():
                    found[key][rows] = total
        return found

    def _terms(self, names: frozenset[str]) -> dict[str, list[Term]]:
        """For each input that the results depend on: results that have cotangents, and their derivatives by the input.

        They are the same for each block of targets, so they are kept.
        """
        if names in self.known:
            return self.known[names]
        terms = self._linear_terms(names) if self.factors else self._elementwise_terms(names)
        for own_terms in terms.values():  # a sum that starts with a factor of 1 takes one pass less
            own_terms.sort(key=lambda term: not _is_one(term[1]))
        self.known[names] = terms
        return terms

    def _linear_terms(self, names: frozenset[str]) -> dict[str, list[Term]]:
        terms: dict[str, list[Term]] = defaultdict(list)
        for name, factors in self.factors.items():
            for result, own_factors in factors.items():
                if (key := _key(result, name)) in names:
                    for own, factor in own_factors.items():
                        terms[_key(own, name)].append((key, factor))
        return terms

    def _elementwise_terms(self, names: frozenset[str]) -> dict[str, list[Term]]:
        inputs = _joined(self.inputs)
        terms: dict[str, list[Term]] = defaultdict(list)
        for number in range(max(map(len, self.outputs.values()), default=0)):
            chosen = {}  # one result of each parameter, so that one pass finds the derivatives of all of them
            for name, outputs in self.outputs.items():
                for key, output in list(outputs.items())[number : number + 1]:
                    if key in names and output.requires_grad:
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
                        terms[own].append((key, _number(derivative)))
        return terms


def _key(kind: str, name: str) -> str:
    """The name of a cotangent: of ``"parameter"``, ``"gradient"`` or a moment of a parameter."""
    return f"{kind}/{name}" if kind in ("parameter", "gradient") else f"moment/{name}/{kind}"


@torch.no_grad()
def _weighted_sum(tensors: Mapping[str, Tensor], factors: Mapping[str, float]) -> Tensor:
    (first, factor), *others = sorted(factors.items(), key=lambda term: term[1] != 1)
    total = tensors[first] if factor == 1 else tensors[first] * factor
    for key, factor in others:
        total = torch.add(total, tensors[key], alpha=factor)
    return total


def _joined(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {key: tensor for group in tensors.values() for key, tensor in group.items()}


def _number(derivative: Tensor) -> Tensor | float:
    """The number that all elements are, as in SGD; else the tensor. Products with a number take half of the time."""
    if not derivative.numel():
        return derivative
    low, high = derivative.aminmax()
    return float(low) if low == high else derivative


def _sum(terms: list[Term], cotangents: Cotangents, rows: slice, out: Tensor | None = None) -> Tensor:
    """Products of cotangents with the derivatives of their results, added up. ``out`` may be the first of them."""
    (first, factor), *others = terms
    total = cotangents[first][rows]
    if others and isinstance(factor, float) and isinstance(others[0][1], float):
        total = out = _weighted(total, factor, cotangents[others[0][0]][rows], others[0][1], out)
        others = others[1:]
    elif not others or not _is_one(factor):
        total = out = torch.mul(total, factor, out=out)
    for key, factor in others:
        if isinstance(factor, float):
            total = out = torch.add(total, cotangents[key][rows], alpha=factor, out=out)
        else:
            total = out = torch.addcmul(total, cotangents[key][rows], factor, out=out)
    return total


def _weighted(first: Tensor, beta: float, second: Tensor, alpha: float, out: Tensor | None) -> Tensor:
    """``beta * first + alpha * second`` in one pass over the memory, as an outer product with 1."""
    place = torch.empty_like(first) if out is None else out
    one = first.new_ones(1)
    torch.addr(first.view(1, -1), one, second.view(-1), beta=beta, alpha=alpha, out=place.view(1, -1))
    return place


def _ratio(terms: list[Term], to: list[Term] | None, dtype: torch.dtype) -> float | None:
    """The number by which some terms are a multiple of other ones, if there is one. Momentum of SGD is an example."""
    own, other = dict(terms), dict(to or ())
    if own.keys() != other.keys() or not all(isinstance(factor, float) for factor in (*own.values(), *other.values())):
        return None
    ratios = [float(own[name]) / float(other[name]) if other[name] else math.nan for name in other]
    rounding = 4 * torch.finfo(dtype).eps * abs(ratios[0])
    return ratios[0] if all(abs(ratio - ratios[0]) <= rounding for ratio in ratios) else None


def _is_one(derivative: Tensor | float) -> bool:
    return isinstance(derivative, float) and derivative == 1


def _is_identity(key: str, terms: list[Term]) -> bool:
    """Whether the derivative by an input is that by the result of the same name, as for weights that do not decay."""
    (result, derivative), *others = terms
    return result == key and not others and _is_one(derivative)


def _collected(keys: Collection[str], blocks: Iterable[tuple[slice, list[Tensor | None]]]) -> Cotangents:
    """Products of all blocks, by name. No two of them share memory, since they are changed in place later."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for _, found in blocks:
        for key, part in zip(keys, found, strict=True):
            if part is not None:
                parts[key].append(part)
    joined = {key: column[0] if len(column) == 1 else torch.cat(column) for key, column in parts.items()}
    places: set[int] = set()
    for key, part in joined.items():
        place = part.untyped_storage().data_ptr()
        if place in places or not part.is_contiguous():
            joined[key] = part.clone(memory_format=torch.contiguous_format)
        places.add(place)
    return joined
