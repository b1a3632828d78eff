"""Gradients in a shorter exact form: as two factors, or as the few rows that are not zero.

A linear layer's gradient is a sum over positions of outer products, A^T B, with the gradients A of its output
(positions x outputs) and its inputs B (positions x inputs). If there are few positions, A and B are fewer numbers than
A^T B. The same holds for a convolution and its patches. An embedding's gradient has a row that is not zero for each
position.

The forms are chosen once, by the shapes of a few examples. Examples with fewer positions are filled up with zeros,
which add nothing to a product. An example with more positions is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lightning_trak.gradients.base import EngineError, GradientEngine, real_shape
from lightning_trak.gradients.batch import ExampleBatch
from lightning_trak.gradients.hooks.engine import HookEngine
from lightning_trak.gradients.hooks.layers import Layer, LayerCall
from lightning_trak.gradients.hooks.mixed import MixedEngine
from lightning_trak.gradients.hooks.tracked_module import TrackedModule
from lightning_trak.storage.schemas import Schema, integer, items, one_of, parse_json, record, text

_MOST_IDS = 1 << 24  # float32 has no other integers up to here
_MOST = 1 << 40


@dataclass(frozen=True)
class GradientForm:
    """How the gradient of a parameter is stored. The gradient is a matrix of rows x columns.

    Attributes:
        name: the canonical name of the parameter.
        kind: ``"gradient"``: all its elements; ``"factors"``: A, then B, of the product A^T B; ``"rows"``: rows of the
            matrix, then the index of each.
        positions: the number of rows of A and B, or of stored rows; 1 for a gradient.
        rows: rows of the gradient's matrix.
        columns: columns of the gradient's matrix.
    """

    name: str
    kind: Literal["gradient", "factors", "rows"]
    positions: int
    rows: int
    columns: int

    @property
    def width(self) -> int:
        """How many numbers are stored for each example."""
        if self.kind == "gradient":
            return self.rows * self.columns
        return self.positions * (self.columns + (self.rows if self.kind == "factors" else 1))

    def parts(self, stored: Tensor) -> tuple[Tensor, Tensor]:
        """A and B, ``(n, positions, rows)`` and ``(n, positions, columns)``, or stored rows and their indices.

        Args:
            stored: the stored numbers of this parameter, shape ``(n, width)``.
        """
        first = self.rows if self.kind == "factors" else self.columns
        left, right = stored.tensor_split([self.positions * first], 1)
        if self.kind == "factors":
            return left.view(-1, self.positions, self.rows), right.view(-1, self.positions, self.columns)
        return left.view(-1, self.positions, self.columns), right

    def gradients(self, stored: Tensor) -> Tensor:
        """The gradients themselves, shape ``(n, rows * columns)``."""
        if self.kind == "gradient":
            return stored
        left, right = self.parts(stored)
        if self.kind == "factors":
            return (left.mT @ right).flatten(1)
        found = left.new_zeros(len(left), self.rows, self.columns)
        indices = right.long().unsqueeze(2).expand(-1, -1, self.columns)
        return found.scatter_add_(1, indices, left).flatten(1)


class GradientForms:
    """The forms of all parameters, side by side in the rows that are stored.

    Args:
        forms: one for each parameter, in the order of the gradient.

    Attributes:
        width: how many numbers are stored for each example.
    """

    def __init__(self, forms: Sequence[GradientForm]) -> None:
        self._places: dict[str, tuple[GradientForm, slice]] = {}
        start = 0
        for form in forms:
            self._places[form.name] = form, slice(start, start + form.width)
            start += form.width
        self.width = start

    def __iter__(self) -> Iterator[tuple[GradientForm, slice]]:
        """Each form, and the columns that hold it."""
        return iter(self._places.values())

    @property
    def are_whole(self) -> bool:
        """Whether all are the gradients themselves, so that any engine can give them."""
        return all(form.kind == "gradient" for form, _ in self)

    def gradients(self, stored: Tensor) -> Tensor:
        """The whole gradients of some examples, shape ``(n, p)``."""
        return torch.cat([form.gradients(stored[:, columns]) for form, columns in self], dim=1)

    def to_tensors(self) -> dict[str, Tensor]:
        """The forms as tensors for a file."""
        content = json.dumps([asdict(form) for form, _ in self]).encode()
        return {"forms": torch.frombuffer(bytearray(content), dtype=torch.uint8)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> GradientForms:
        """The forms that :meth:`to_tensors` wrote."""
        return cls([GradientForm(**form) for form in parse_json(bytes(tensors["forms"].tolist()), _SCHEMA)])

    def merged(self, other: GradientForms) -> GradientForms:
        """Forms for the examples of both: the larger number of positions, or the gradient where kinds differ."""
        merged = []
        for (mine, _), (theirs, _) in zip(self, other, strict=True):
            if mine.kind == theirs.kind:
                merged.append(replace(mine, positions=max(mine.positions, theirs.positions)))
            else:
                merged.append(mine if mine.kind == "gradient" else theirs)
        return GradientForms([_shortest(form) for form in merged])

    def collect(self, engine: GradientEngine, batch: ExampleBatch, stored: Tensor) -> Tensor:
        """Differentiate a batch, and write the gradients in these forms.

        Args:
            engine: the engine. Only hooks can give another form than the gradient.
            batch: the examples.
            stored: zeros, shape ``(size, width)``; changed in place.

        Returns:
            The outputs, shape ``(size,)``.

        Raises:
            EngineError: if hooks would give a wrong gradient, or a layer was called more often than before.
            ValueError: if an example has more positions than the forms have, or the engine cannot give them.
        """
        written: set[str] = set()

        def receive(tracked: TrackedModule, call: LayerCall) -> None:
            for attribute, name in tracked.parameters.items():
                form, columns = self._places[name]
                if form.kind == "gradient":
                    stored[:, columns] += tracked.layer.gradient(attribute, call).reshape(call.size, -1)
                    continue
                if name in written:
                    raise EngineError(
                        f"{name} is used several times in a forward pass, but was used once by the first examples",
                        [name],
                    )
                written.add(name)
                self._write(form, stored[:, columns], *_parts(tracked.layer, attribute, form.kind, call))

        if isinstance(engine, HookEngine):
            return engine.backward(batch, receive)
        if isinstance(engine, MixedEngine):
            hooks, others = engine.parts
            self._write_whole(others(batch)[1], stored)
            return hooks.backward(batch, receive)
        values, gradients = engine(batch)
        self._write_whole(gradients, stored)
        return values

    def _write_whole(self, gradients: Mapping[str, Tensor], stored: Tensor) -> None:
        for name, rows in gradients.items():
            form, columns = self._places[name]
            if form.kind != "gradient":
                raise ValueError(
                    "the store keeps gradients in the form that module hooks give, and this engine gives another: use"
                    " another directory, with engine='functional' or 'loop' if hooks have got a gradient wrong"
                )
            stored[:, columns] = rows

    @staticmethod
    def _write(form: GradientForm, stored: Tensor, left: Tensor, right: Tensor) -> None:
        found = left.shape[1]
        if found > form.positions:
            raise ValueError(
                f"{form.name} is used at {found} positions of an example, but at {form.positions} of the first"
                " examples, which decide how gradients are stored: pad all examples to one length"
            )
        first, second = form.parts(stored)
        first[:, :found], second[:, :found] = left, right


def find_forms(engine: GradientEngine, batch: ExampleBatch) -> GradientForms:
    """The shortest form of each parameter's gradient.

    Gradients of a parameter that is used several times in a forward pass are added up, in no other form than their own.

    Args:
        engine: the engine. Only hooks can give another form than the gradient.
        batch: some examples.
    """
    found: dict[str, GradientForm] = {}
    sizes = {name: real_shape(parameter).numel() for name, parameter in engine.parameters.items()}

    def receive(tracked: TrackedModule, call: LayerCall) -> None:
        for attribute, name in tracked.parameters.items():
            whole = GradientForm(name, "gradient", 1, 1, sizes[name])
            found[name] = whole if name in found else _form(tracked.layer, attribute, call, whole)

    hooks = engine.parts[0] if isinstance(engine, MixedEngine) else engine
    if isinstance(hooks, HookEngine):
        hooks.backward(batch, receive)
    return GradientForms([found.get(name, GradientForm(name, "gradient", 1, 1, size)) for name, size in sizes.items()])


def _form(layer: Layer, attribute: str, call: LayerCall, whole: GradientForm) -> GradientForm:
    if attribute == "weight" and layer.has_factors():
        height = len(layer.module.get_parameter(attribute))
        width = whole.columns // height
        return _shortest(GradientForm(whole.name, "factors", layer.positions(call), height, width))
    nonzero = layer.nonzero_rows(attribute, call)
    if nonzero is None:
        return whole
    rows, _ = nonzero
    width = rows.shape[2]
    return _shortest(GradientForm(whole.name, "rows", rows.shape[1], whole.columns // width, width))


def _shortest(form: GradientForm) -> GradientForm:
    """The form itself, or the gradient if that is shorter, or its products are cheaper for rows."""
    whole = GradientForm(form.name, "gradient", 1, 1, form.rows * form.columns)
    if form.kind == "rows" and (form.positions**2 >= form.rows or form.rows > _MOST_IDS):
        return whole
    return form if form.width < whole.width else whole


def _parts(layer: Layer, attribute: str, kind: str, call: LayerCall) -> tuple[Tensor, Tensor]:
    """A and B of the product A^T B, or the rows that are not zero and their indices."""
    if kind == "factors":
        return layer.matrix_factors(call)
    nonzero = layer.nonzero_rows(attribute, call)
    if nonzero is None:
        raise EngineError(f"{type(layer).__name__} gave rows for the first examples, and none for this one")
    return nonzero


_SCHEMA: Schema = items(
    record(
        {
            "name": text(),
            "kind": one_of("gradient", "factors", "rows"),
            "positions": integer(1, _MOST),
            "rows": integer(0, _MOST),
            "columns": integer(0, _MOST),
        }
    ),
    least=1,
)
