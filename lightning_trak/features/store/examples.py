"""A few examples as tensors and JSON, so that their outputs can be computed again without the training data."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from lightning_trak.gradients.batch import ExampleBatch, Kind

_PLAIN = (str, int, float, bool, type(None))


class NotStorableError(TypeError):
    """A batch holds objects that cannot be stored, or its types are not known in this process."""


def pack(batch: ExampleBatch) -> dict[str, Tensor]:
    """Convert a batch to tensors. One of them holds the structure of the batch as JSON.

    Args:
        batch: a batch of tensors, numbers and texts in lists, tuples, mappings and dataclasses.

    Raises:
        NotStorableError: if the batch holds other objects.
    """
    tensors: dict[str, Tensor] = {}
    layout = [[list(path), kind] for path, kind in (batch.layout or {}).items()]
    about = {"size": batch.size, "layout": layout, "batch": _node(batch.content, tensors)}
    try:
        text = json.dumps(about, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise NotStorableError(
            f"a batch with keys or numbers that JSON does not allow cannot be stored: {error}"
        ) from error
    return tensors | {"structure": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}


def unpack(packed: Mapping[str, Tensor]) -> ExampleBatch:
    """Restore the batch that was given to :func:`pack`.

    Raises:
        NotStorableError: if one of its types comes from a module that this process has not imported. Nothing is
            imported here, because a file must not decide which code runs.
    """
    about = json.loads(bytes(packed["structure"].tolist()))
    layout: dict[Any, Kind] = {tuple(path): cast(Kind, kind) for path, kind in about["layout"]}
    return ExampleBatch(_part(about["batch"], packed), about["size"], layout)


def _node(part: Any, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A part of a batch in JSON's types. Its tensors are added to those given, and named in their place."""
    if isinstance(part, Tensor):
        if part.is_nested or part.layout != torch.strided:
            raise NotStorableError("a batch that holds a sparse or nested tensor cannot be stored")
        tensors[str(len(tensors))] = part.detach().cpu().clone()
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(part, _PLAIN):
        return {"plain": part}
    if isinstance(part, Mapping):
        return {"mapping": _name(part), "parts": [[key, _node(value, tensors)] for key, value in part.items()]}
    if isinstance(part, (list, tuple)):
        return {"sequence": _name(part), "parts": [_node(value, tensors) for value in part]}
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = [field.name for field in dataclasses.fields(part) if field.init]
        return {"dataclass": _name(part), "parts": [[name, _node(getattr(part, name), tensors)] for name in fields]}
    raise NotStorableError(f"a batch that holds a {type(part).__name__} cannot be stored")


def _part(node: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The part of a batch that :func:`_node` described."""
    if "tensor" in node:
        return tensors[node["tensor"]]
    if "plain" in node:
        return node["plain"]
    if "mapping" in node:
        parts = {key: _part(part, tensors) for key, part in node["parts"]}
        kind = _type(node["mapping"], Mapping)
        return parts if kind is dict else kind(parts)
    if "sequence" in node:
        items = [_part(part, tensors) for part in node["parts"]]
        kind = _type(node["sequence"], (list, tuple))
        return kind(*items) if hasattr(kind, "_fields") else kind(items)
    fields = {name: _part(part, tensors) for name, part in node["parts"]}
    return _type(node["dataclass"], object)(**fields)


def _name(part: Any) -> str:
    return f"{type(part).__module__}:{type(part).__qualname__}"


def _type(name: str, base: Any) -> Any:
    module, _, qualified = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in qualified.split("."):
        found = getattr(found, part, None)
    fits = isinstance(found, type) and issubclass(found, base)
    if not fits or (base is object and not dataclasses.is_dataclass(found)):
        raise NotStorableError(f"the type {qualified} of {module} is not known in this process")
    return found
