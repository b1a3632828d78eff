"""Random states: kept unchanged for the user, and recorded before a training step."""

import random
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_trak.compatibility import collect_rng_states, set_rng_states

# States of the generators that a step has drawn from, by the name of the generator, uint8.
RandomStates = Mapping[str, Tensor]

_PYTHON = struct.Struct("<i625I?d")
_NUMPY = struct.Struct("<iid")


@contextmanager
def isolated_random_states() -> Iterator[None]:
    """Restore the random states of Python, NumPy and PyTorch at the end, also after an error.

    Lightning's ``isolate_rng`` does not restore them after an error.
    """
    states = collect_rng_states()
    try:
        yield
    finally:
        set_rng_states(states)


class _Generator(NamedTuple):
    """A global generator: how its state is read and compared, and how it becomes bytes and is restored from them."""

    read: Callable[[torch.device], Any]
    same: Callable[[Any, Any], bool]
    pack: Callable[[Any], Tensor]
    restore: Callable[[Tensor, torch.device], None]


def _read_numpy(device: torch.device) -> dict[str, Any]:
    del device
    return np.random.get_state(legacy=False)  # noqa: NPY002


def _same_numpy(one: dict[str, Any], other: dict[str, Any]) -> bool:
    (a, b), fields = (one["state"], other["state"]), ("has_gauss", "gauss")
    return a["pos"] == b["pos"] and np.array_equal(a["key"], b["key"]) and all(one[key] == other[key] for key in fields)


def _pack_numpy(state: dict[str, Any]) -> Tensor:
    numbers = _NUMPY.pack(state["state"]["pos"], state["has_gauss"], state["gauss"])
    return _tensor(numbers + state["state"]["key"].astype("<u4").tobytes())


def _restore_numpy(packed: Tensor, device: torch.device) -> None:
    del device
    content = packed.numpy().tobytes()
    position, has_gauss, gauss = _NUMPY.unpack_from(content)
    key = np.frombuffer(content, "<u4", offset=_NUMPY.size).astype(np.uint32)
    np.random.set_state(("MT19937", key, position, has_gauss, gauss))  # noqa: NPY002


def _pack_python(state: tuple[Any, ...]) -> Tensor:
    version, numbers, gauss = state
    return _tensor(_PYTHON.pack(version, *numbers, gauss is not None, gauss or 0.0))


def _restore_python(packed: Tensor, device: torch.device) -> None:
    del device
    version, *numbers, has_gauss, gauss = _PYTHON.unpack(packed.numpy().tobytes())
    random.setstate((version, tuple(numbers), gauss if has_gauss else None))


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


_GENERATORS = {
    "torch": _Generator(
        lambda device: torch.get_rng_state(),  # noqa: ARG005
        torch.equal,
        lambda state: state,
        lambda packed, device: torch.set_rng_state(packed),  # noqa: ARG005
    ),
    "numpy": _Generator(_read_numpy, _same_numpy, _pack_numpy, _restore_numpy),
    "python": _Generator(
        lambda device: random.getstate(),  # noqa: ARG005
        lambda one, other: one == other,
        _pack_python,
        _restore_python,
    ),
}
_CUDA = _Generator(torch.cuda.get_rng_state, torch.equal, lambda state: state, torch.cuda.set_rng_state)


def _generators(device: torch.device) -> dict[str, _Generator]:
    return _GENERATORS | {"cuda": _CUDA} if device.type == "cuda" else _GENERATORS


class RandomWatch:
    """Notes which global generators some code draws from, and their states before it.

    Args:
        device: the device that the code computes on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = {name: generator.read(device) for name, generator in _generators(device).items()}

    def drawn(self) -> dict[str, Tensor]:
        """The states before, for :func:`restore_random_states`, of the generators that were drawn from since."""
        generators = _generators(self._device)
        return {
            name: generators[name].pack(before)
            for name, before in self._before.items()
            if not generators[name].same(before, generators[name].read(self._device))
        }


def restore_random_states(states: RandomStates, device: torch.device) -> None:
    """Set the generators to recorded states.

    Args:
        states: the result of :meth:`RandomWatch.drawn`. A state of CUDA is left out on another device, whose generator
            is a different one.
        device: the device that computes.
    """
    generators = _generators(device)
    for name, state in states.items():
        if name in generators:
            generators[name].restore(state, device)
