"""Random states: kept unchanged for the user, and recorded before a training step."""

import ctypes
import random
import struct
import sys
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
_TWISTER = struct.Struct("=625I")  # a Mersenne Twister: a position, and 624 numbers

_PythonState = tuple[bytes, float | None]


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
    """A global generator.

    Attributes:
        read: its state, in a form that can be compared. If it has not changed, the state that the call gets, which is
            the last one that was read, or None.
        pack: a state as bytes.
        restore: set the generator to such bytes.
    """

    read: Callable[[torch.device, Any], Any]
    pack: Callable[[Any], Tensor]
    restore: Callable[[Tensor, torch.device], None]


def _read_torch(device: torch.device, last: bytes | None) -> bytes:
    del device, last
    state = torch.default_generator.get_state()
    return ctypes.string_at(state.data_ptr(), state.nbytes)


def _read_cuda(device: torch.device, last: bytes | None) -> bytes:
    del last
    return torch.cuda.get_rng_state(device).numpy().tobytes()


class _NumPyState(NamedTuple):
    """A state of ``numpy.random``.

    Attributes:
        memory: its 624 numbers and position, as the generator keeps them.
        position: among the numbers.
        has_gauss: whether a Gaussian number waits. It is not in the generator's memory.
        gauss: the Gaussian number.
        key: the numbers.
    """

    memory: bytes
    position: int
    has_gauss: int
    gauss: float
    key: bytes


def _read_numpy(device: torch.device, last: _NumPyState | None) -> _NumPyState:
    del device
    generator: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if not isinstance(generator, np.random.MT19937):
        raise ValueError(
            f"numpy.random draws from {type(generator).__name__}, whose state is not recorded; leave it at MT19937"
        )
    # numpy.random.get_state makes 624 numbers, which takes long for the step of a small model. Without it: no Gaussian
    # number waits if none did and nothing was drawn, since they are drawn in pairs.
    memory = ctypes.string_at(generator.ctypes.state_address, _TWISTER.size)
    if last is not None and memory == last.memory and not last.has_gauss:
        return last
    state: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002
    key = state["state"]["key"].astype("<u4").tobytes()
    return _NumPyState(memory, state["state"]["pos"], state["has_gauss"], state["gauss"], key)


def _pack_numpy(state: _NumPyState) -> Tensor:
    return _tensor(_NUMPY.pack(state.position, state.has_gauss, state.gauss) + state.key)


def _restore_numpy(packed: Tensor, device: torch.device) -> None:
    del device
    content = packed.numpy().tobytes()
    position, has_gauss, gauss = _NUMPY.unpack_from(content)
    key = np.frombuffer(content, "<u4", offset=_NUMPY.size).astype(np.uint32)
    np.random.set_state(("MT19937", key, position, has_gauss, gauss))  # noqa: NPY002


def _python_reader() -> Callable[[], _PythonState]:
    """A function that reads the state of Python's ``random``, in about a microsecond.

    ``random.getstate`` makes 625 objects, which takes long for the step of a small model. CPython keeps the same
    numbers behind the head of the generator. Where they are not found there, the function asks ``getstate``.

    Returns:
        A function without arguments. It gives the position among the numbers and the 624 numbers, uint32 in the
        machine's order of bytes, and the Gaussian number that waits, or None.
    """
    generator: Any = random.getstate.__self__  # type: ignore[attr-defined]

    def ask() -> _PythonState:
        _, (*numbers, position), gauss = random.getstate()
        return _TWISTER.pack(position, *numbers), gauss

    def look() -> _PythonState:
        return ctypes.string_at(id(generator) + object.__basicsize__, _TWISTER.size), generator.gauss_next

    large_enough = type(generator).__basicsize__ >= object.__basicsize__ + _TWISTER.size
    return look if sys.implementation.name == "cpython" and large_enough and look() == ask() else ask


python_state = _python_reader()


def _read_python(device: torch.device, last: _PythonState | None) -> _PythonState:
    del device, last
    return python_state()


def _pack_python(state: _PythonState) -> Tensor:
    (position, *numbers), gauss = _TWISTER.unpack(state[0]), state[1]
    return _tensor(_PYTHON.pack(random.Random.VERSION, *numbers, position, gauss is not None, gauss or 0.0))


def _restore_python(packed: Tensor, device: torch.device) -> None:
    del device
    version, *numbers, has_gauss, gauss = _PYTHON.unpack(packed.numpy().tobytes())
    random.setstate((version, tuple(numbers), gauss if has_gauss else None))


def _restore_torch(packed: Tensor, device: torch.device) -> None:
    del device
    torch.set_rng_state(packed)


def _restore_cuda(packed: Tensor, device: torch.device) -> None:
    torch.cuda.set_rng_state(packed, device)


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


_GENERATORS = {
    "torch": _Generator(_read_torch, _tensor, _restore_torch),
    "cuda": _Generator(_read_cuda, _tensor, _restore_cuda),
    "numpy": _Generator(_read_numpy, _pack_numpy, _restore_numpy),
    "python": _Generator(_read_python, _pack_python, _restore_python),
}


def _generators(device: torch.device) -> dict[str, _Generator]:
    return {name: generator for name, generator in _GENERATORS.items() if name != "cuda" or device.type == "cuda"}


class RandomWatch:
    """Notes which global generators each of many steps draws from, and their states before it.

    Args:
        device: the device that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._generators = list(_generators(device).items())
        self._states: dict[str, Any] = dict.fromkeys(_generators(device))

    def before(self) -> None:
        """Call this before a step."""
        states = self._states
        for name, generator in self._generators:
            states[name] = generator.read(self._device, states[name])

    def drawn(self) -> dict[str, Tensor]:
        """Call this after a step.

        Returns:
            The states before the step, for :func:`restore_random_states`, of the generators that it has drawn from.
        """
        found, states = {}, self._states
        for name, generator in self._generators:
            before = states[name]
            after = states[name] = generator.read(self._device, before)
            if after is not before and after != before:
                found[name] = generator.pack(before)
        return found


def restore_random_states(states: RandomStates, device: torch.device) -> None:
    """Set the generators to recorded states.

    Args:
        states: the result of :meth:`RandomWatch.drawn`.
        device: the device that computes.

    Raises:
        ValueError: if there is a state of CUDA, and the device is another one, whose generator draws other numbers.
    """
    generators = _generators(device) if states else {}
    if not states.keys() <= generators.keys():
        raise ValueError(
            f"training drew random numbers on a GPU, as for dropout, and {device} cannot draw them again; use a Trainer"
            ' with accelerator="gpu"'
        )
    for name, state in states.items():
        generators[name].restore(state, device)
