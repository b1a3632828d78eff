"""What one needs to do an optimizer step again, and how many steps become a few tensors."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_trak.running.random_states import RandomStates
from lightning_trak.storage.schemas import Schema, anything, integer, items, one_of, record, text


class MicroBatch(NamedTuple):
    """A batch of training. With gradient accumulation, several make up an optimizer step.

    Attributes:
        positions: positions of its examples in the dataset, in order.
        batch_idx: the number that ``training_step`` got.
        random_states: the states of the generators that ``training_step`` drew from, before it did.
    """

    positions: Sequence[int]
    batch_idx: int
    random_states: RandomStates = MappingProxyType({})


@dataclass(frozen=True)
class Structure:
    """Which tensors a step trains, and how. It changes seldom, for example when layers are unfrozen.

    Attributes:
        groups: canonical names of the parameters of each group of the optimizer.
        frozen: canonical names of the parameters that do not require gradients.
        evaluating: names of the modules in eval mode.
    """

    groups: tuple[tuple[str, ...], ...]
    frozen: tuple[str, ...]
    evaluating: tuple[str, ...]

    @property
    def trained(self) -> list[str]:
        """Canonical names of the parameters that the step may change."""
        frozen = set(self.frozen)
        return [name for group in self.groups for name in group if name not in frozen]


@dataclass(frozen=True)
class Settings:
    """The numbers of an optimizer step.

    Attributes:
        groups: hyperparameters of each group of the optimizer, by name.
        accumulate: the number that each loss was divided by.
        clip: the bound of gradient clipping; 0 for none.
        clip_by: ``"norm"`` or ``"value"``.
    """

    groups: tuple[dict[str, Any], ...]
    accumulate: int
    clip: float
    clip_by: str


class StepRecord(NamedTuple):
    """An optimizer step.

    Attributes:
        step: number of the step, from 0: the steps that were taken before it.
        epoch: number of the epoch, as ``current_epoch`` counts them.
        structure: what it trains.
        settings: its numbers.
        micro_batches: its batches, in order.
    """

    step: int
    epoch: int
    structure: Structure
    settings: Settings
    micro_batches: tuple[MicroBatch, ...]


_names = items(text())
_groups = items(record({}, others=anything))
_tables: dict[str, Schema] = {
    "structures": items(record({"groups": items(_names), "frozen": _names, "evaluating": _names})),
    "settings": items(
        record(
            {
                "groups": _groups,
                "accumulate": integer(1, 1 << 62),
                "clip": anything,
                "clip_by": one_of("norm", "value"),
            }
        )
    ),
}


def pack_steps(steps: Sequence[StepRecord]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Steps as tensors by name, and as tables in JSON's types: equal structures and settings are kept once."""
    micro = [batch for step in steps for batch in step.micro_batches]
    positions = array("q")  # most of the numbers, so not one by one
    for batch in micro:
        positions.extend(batch.positions)
    drawn = torch.empty(len(positions), dtype=torch.int64)
    drawn.numpy()[:] = positions
    structures, settings = _Table(), _Table()
    rows = [
        [step.epoch, structures.row(step.structure), settings.row(step.settings), len(step.micro_batches)]
        for step in steps
    ]
    tensors = {
        "steps": torch.tensor(rows, dtype=torch.int64).reshape(-1, 4),
        "batches": torch.tensor([[len(b.positions), b.batch_idx] for b in micro], dtype=torch.int64).reshape(-1, 2),
        "positions": drawn,
    }
    for name in sorted({name for batch in micro for name in batch.random_states}):
        drawing = [number for number, batch in enumerate(micro) if name in batch.random_states]
        tensors[f"random/{name}/batches"] = torch.tensor(drawing, dtype=torch.int64)
        tensors[f"random/{name}/states"] = torch.stack([micro[number].random_states[name] for number in drawing])
    return tensors, {"structures": structures.rows, "settings": settings.rows}


def unpack_steps(first: int, tensors: dict[str, Tensor], tables: dict[str, Any]) -> list[StepRecord]:
    """The steps of :func:`pack_steps`.

    Args:
        first: number of the first step.
        tensors: the tensors.
        tables: the tables.

    Raises:
        ValueError: if a table is not one of :func:`pack_steps`.
    """
    for name, schema in _tables.items():
        schema(name, tables.get(name))
    structures = [
        Structure(tuple(map(tuple, row["groups"])), tuple(row["frozen"]), tuple(row["evaluating"]))
        for row in tables["structures"]
    ]
    settings = [
        Settings(tuple(map(_group, row["groups"])), row["accumulate"], float(row["clip"]), row["clip_by"])
        for row in tables["settings"]
    ]
    states: dict[int, dict[str, Tensor]] = {}
    for key, drawing in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "random" and rest.endswith("/batches"):
            name = rest.removesuffix("/batches")
            for number, state in zip(drawing.tolist(), tensors[f"random/{name}/states"], strict=True):
                states.setdefault(number, {})[name] = state.clone()
    sizes = tensors["batches"].tolist()
    parts = torch.split(tensors["positions"], [size for size, _ in sizes])
    micro = [
        MicroBatch(part.tolist(), batch_idx, states.get(number, {}))
        for number, (part, (_, batch_idx)) in enumerate(zip(parts, sizes, strict=True))
    ]
    found, start = [], 0
    for number, (epoch, structure, setting, count) in enumerate(tensors["steps"].tolist()):
        batches = tuple(micro[start : start + count])
        found.append(StepRecord(first + number, epoch, structures[structure], settings[setting], batches))
        start += count
    return found


class _Table:
    """Distinct values in JSON's types, in the order in which they came."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self._numbers: dict[str, int] = {}
        self._seen: dict[int, tuple[Any, int]] = {}

    def row(self, value: Structure | Settings) -> int:
        """The number of the row that holds the value."""
        known = self._seen.get(id(value))
        if known is None:
            content = dict(vars(value))
            key = json.dumps(content, sort_keys=True)
            number = self._numbers.setdefault(key, len(self.rows))
            if number == len(self.rows):
                self.rows.append(content)
            known = self._seen[id(value)] = value, number
        return known[1]


def _group(group: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters as the optimizer had them: JSON has lists in place of tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in group.items()}
