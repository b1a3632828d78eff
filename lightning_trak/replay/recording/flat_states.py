"""Full states as a few long tensors, which are copied, checked and written faster than many short ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_trak.replay.recording.states import TrainingState
from lightning_trak.storage.schemas import integer, items, row, text

# Which tensors the long ones consist of, in order: each one's long tensor, name and shape, in JSON's types.
Layout = list[list[Any]]

_count = integer(0, 1 << 62)
layouts_schema = items(items(row(_count, text(), items(_count))))


class FlatState(NamedTuple):
    """A copy of a full state, in the memory of the host.

    Attributes:
        tensors: all tensors of a dtype and a device, one after the other.
        layout: where each of them is.
    """

    tensors: list[Tensor]
    layout: Layout

    @classmethod
    def of(cls, state: TrainingState, spare: FlatState | None = None) -> FlatState:
        """Copy a state.

        Args:
            state: the state.
            spare: another copy that nobody needs any more. Its memory is used again, if it fits: the operating system
                takes longer to give new memory than the copy takes.
        """
        groups: dict[Any, list[Tensor]] = {}
        numbers: dict[Any, int] = {}
        layout: Layout = []
        for name, tensor in state.tensors():
            kind = tensor.dtype, tensor.device
            layout.append([numbers.setdefault(kind, len(numbers)), name, list(tensor.shape)])
            groups.setdefault(kind, []).append(tensor.reshape(-1))
        kinds = [(tensor.dtype, tensor.device) for tensor in spare.tensors] if spare else []
        if spare is None or spare.layout != layout or kinds != list(groups):
            return cls([torch.cat(group).cpu() for group in groups.values()], layout)
        for group, out in zip(groups.values(), spare.tensors, strict=True):
            torch.cat(group, out=out)
        return spare

    @property
    def nbytes(self) -> int:
        """The number of bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def pack_states(states: Mapping[int, FlatState]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States by their steps as tensors by name, and a table of their layouts: equal ones are kept once."""
    tensors: dict[str, Tensor] = {}
    layouts: list[Layout] = []
    for step, state in states.items():
        if state.layout not in layouts:
            layouts.append(state.layout)
        number = layouts.index(state.layout)
        tensors |= {f"state/{step}/{number}/{group}": tensor for group, tensor in enumerate(state.tensors)}
    return tensors, {"layouts": layouts}


def unpack_state(step: int, tensors: Mapping[str, Tensor], layouts: Sequence[Layout]) -> TrainingState:
    """A state of :func:`pack_states`. Its tensors are parts of the given ones.

    Args:
        step: its step.
        tensors: the tensors by name.
        layouts: the table of layouts.
    """
    groups, layout = {}, 0
    for name, tensor in tensors.items():
        kind, *numbers = name.split("/")
        if kind == "state" and int(numbers[0]) == step:
            layout = int(numbers[1])
            groups[int(numbers[2])] = tensor
    starts, found = dict.fromkeys(groups, 0), {}
    for group, name, shape in layouts[layout]:
        stop = starts[group] + math.prod(shape)
        found[name] = groups[group][starts[group] : stop].reshape(shape)
        starts[group] = stop
    return TrainingState.from_tensors(found)
