"""A batch of many structures, one in another."""

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Pair(NamedTuple):
    first: Tensor
    second: Any


@dataclass
class Record:
    values: Tensor
    name: str


def nested(size: int) -> dict[str, Any]:
    """A batch of at most three examples, with items that are the same in every batch."""
    values = torch.arange(size)
    return {
        "pair": Pair(values, ["a", "b", "c"][:size]),
        "record": Record(values * 2, "shared"),
        "ordered": OrderedDict(x=[values, (values, 1.5)]),
        "user": UserDict(y=values),
        "classes": ["cat", "dog", "emu"],
        "images": [torch.full((2, 2 + i), float(i)) for i in range(size)],
        "height and width": (3, 3),
        "weights": torch.ones(3),
        "temperature": torch.tensor(0.5),
        "plain": [1, 2.5, True, None, ("text", ())],
    }
