"""Items and batches of a specification, and how a batch's parts are found again."""

import copy
import dataclasses
from collections import OrderedDict, UserDict, namedtuple
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from tests.fuzz.parts import CLASSES, VOCABULARY, WIDTH
from tests.fuzz.specs import Spec

Named = namedtuple("Named", ["x", "mask", "extras", "labels"])

INPUTS = ("x", "mask")


@dataclasses.dataclass
class Record:
    x: Any
    mask: Any
    labels: Tensor
    extras: dict[str, Any] = dataclasses.field(default_factory=dict)


class Examples(Dataset):
    """Items of the given lengths, the same each time that they are asked for."""

    def __init__(self, spec: Spec, lengths: tuple[int, ...], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def floats(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        def whole(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=generator)

        make = {
            "vectors": lambda length: floats(WIDTH),
            "floats": lambda length: floats(length, WIDTH),
            "ids": lambda length: whole(VOCABULARY - 1, length) + 1,
            "images": lambda length: floats(2, 4, 4),
        }[spec.kind]
        self.items = []
        for number, length in enumerate(lengths):
            label = floats() if spec.output == "regression" else whole(2 if spec.output == "binary" else CLASSES)
            weight = torch.rand((), generator=generator, dtype=torch.float64) + 0.5
            self.items.append({"x": make(length), "label": label, "weight": weight, "number": 1.0 + number % 3})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return copy.deepcopy(self.items[index])


@dataclasses.dataclass(frozen=True)
class Collate:
    """The specification's collate function."""

    spec: Spec

    def __call__(self, items: list[dict[str, Any]]) -> Any:
        spec = self.spec
        rows, labels = [item["x"] for item in items], torch.stack([item["label"] for item in items])
        mask = None
        if spec.kind in ("floats", "ids"):
            lengths = torch.tensor([len(row) for row in rows])
            mask = torch.arange(int(lengths.max())) < lengths[:, None]
        x: Any = pad_sequence(rows, batch_first=True) if mask is not None else torch.stack(rows)
        if spec.form == "rows":
            x = rows
        elif spec.form == "examples_second" and x.ndim > 2:
            x = x.transpose(0, 1).contiguous()
        return pack(spec.form, x, mask, labels, {name: _extra(name, items) for name in spec.extras})


def _extra(name: str, items: list[dict[str, Any]]) -> Any:
    weights = torch.stack([item["weight"] for item in items])
    return {
        "weights": weights,
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "text": "train",
        "texts": [f"example of weight {item['weight']:.2f}" for item in items],
        "numbers": [item["number"] for item in items],
        "class_names": ["a", "b", "c"],
        "image_size": (4, 5),
        "nothing": None,
        "scales": [1.0, 2.0, 5.0],
        "class_weights": torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64),
        "table": torch.tensor([[1.0, 2.0, 5.0]], dtype=torch.float64),
        "count": len(items),
        "sum_of_weights": weights.sum(),
    }[name]


def pack(form: str, x: Any, mask: Any, labels: Tensor, extras: dict[str, Any]) -> Any:
    """A batch of some form."""
    inputs = {"x": x} | ({} if mask is None else {"mask": mask})
    flat = inputs | ({"extras": extras} if extras else {}) | {"labels": labels}
    if form in ("tuple", "list"):
        return (tuple if form == "tuple" else list)(flat.values())
    if form == "named":
        return Named(x, mask, extras, labels)
    if form == "dataclass":
        return Record(x, mask, labels, extras)
    if form == "object":
        return SimpleNamespace(x=x, mask=mask, labels=labels, extras=extras)
    if form == "nested":
        return {"inputs": inputs, "meta": [extras, {"labels": labels}]}
    kinds = {"ordered": OrderedDict, "user_dict": UserDict, "read_only": MappingProxyType}
    return kinds.get(form, dict)(flat)


def unpack(batch: Any, pop: bool = False) -> tuple[Any, Any, Tensor, dict[str, Any]]:
    """Inputs, mask, labels and extras of a batch of any form; ``pop`` takes the labels out of it."""
    if hasattr(batch, "labels"):
        return batch.x, batch.mask, batch.labels, batch.extras
    if "inputs" in batch:
        extras, last = batch["meta"]
        return batch["inputs"]["x"], batch["inputs"].get("mask"), last.pop("labels") if pop else last["labels"], extras
    if isinstance(batch, (tuple, list)):
        labels = batch.pop() if pop and isinstance(batch, list) else batch[-1]
        rest = batch if pop and isinstance(batch, list) else batch[:-1]
        extras = next((value for value in rest if isinstance(value, dict)), {})
        tensors = [value for value in rest if not isinstance(value, dict)]
        return tensors[0], tensors[1] if len(tensors) > 1 else None, labels, extras
    labels = batch.pop("labels") if pop and hasattr(batch, "pop") else batch["labels"]
    return batch["x"], batch.get("mask"), labels, batch.get("extras", {})
