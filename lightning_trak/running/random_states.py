"""Random states: kept unchanged for the user, and recorded before a training step."""

import ctypes
import platform
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
_PYTHON_NUMBERS = struct.Struct("=i624I")
_NUMPY = struct.Struct("<iid")
_MERSENNE_TWISTER = 2500  # bytes of the state: 624 numbers and a position

# Reading the state of NumPy takes long for the step of a small model. It is read before and after this many steps,
# later after each step only.
_EXACT_STEPS = 32


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
        read: its state.
        mark: something short that changes when the generator is drawn from.
        pack: a state as bytes.
        restore: set the generator to such bytes.
    """

    read: Callable[[torch.device], Any]
    mark: Callable[[torch.device], Any]
    pack: Callable[[Any], Tensor]
    restore: Callable[[Tensor, torch.device], None]


def _read_torch(device: torch.device) -> bytes:
    del device
    return bytes(torch.default_generator.get_state().numpy().data)


def _read_cuda(device: torch.device) -> bytes:
    return bytes(torch.cuda.get_rng_state(device).numpy().data)


def _read_numpy(device: torch.device) -> tuple[int, int, float, bytes]:
    del device
    state: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002
    if state["bit_generator"] != "MT19937":
        raise ValueError(
            f"numpy.random draws from {state['bit_generator']}, whose state is not recorded; leave it at MT19937"
        )
    key = state["state"]["key"].astype("<u4").tobytes()
    return state["state"]["pos"], state["has_gauss"], state["gauss"], key


def _mark_numpy(device: torch.device) -> bytes:
    del device
    generator: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
    address = generator.ctypes.state_address  # the getter of the state makes 624 numbers
    return ctypes.string_at(address, _MERSENNE_TWISTER)


def _pack_numpy(state: tuple[int, int, float, bytes]) -> Tensor:
    return _tensor(_NUMPY.pack(*state[:3]) + state[3])


def _restore_numpy(packed: Tensor, device: torch.device) -> None:
    del device
    content = packed.numpy().tobytes()
    position, has_gauss, gauss = _NUMPY.unpack_from(content)
    key = np.frombuffer(content, "<u4", offset=_NUMPY.size).astype(np.uint32)
    np.random.set_state(("MT19937", key, position, has_gauss, gauss))  # noqa: NPY002


def _read_python(device: torch.device) -> tuple[bytes, float | None]:
    """Position and numbers, and the number of ``random.gauss`` that waits."""
    del device
    if _PYTHON_ADDRESS is not None:
        return ctypes.string_at(_PYTHON_ADDRESS, _MERSENNE_TWISTER), _PYTHON_GENERATOR.gauss_next
    return _python_state()


def _python_state() -> tuple[bytes, float | None]:
    _, numbers, gauss = random.getstate()
    return _PYTHON_NUMBERS.pack(numbers[-1], *numbers[:-1]), gauss


def _python_address() -> int | None:
    """Where CPython keeps position and numbers, since to copy them takes a fiftieth of the time of ``getstate``.

    None if they are not found there.
    """
    address, inner = id(_PYTHON_GENERATOR) + object.__basicsize__, type(_PYTHON_GENERATOR).__mro__[1]
    if platform.python_implementation() != "CPython":
        return None
    if object.__basicsize__ + _MERSENNE_TWISTER > inner.__basicsize__:
        return None
    return address if ctypes.string_at(address, _MERSENNE_TWISTER) == _python_state()[0] else None


def _pack_python(state: tuple[bytes, float | None]) -> Tensor:
    content, gauss = state
    position, *numbers = _PYTHON_NUMBERS.unpack(content)
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


_PYTHON_GENERATOR: Any = random.getstate.__self__  # type: ignore[attr-defined]
_PYTHON_ADDRESS = _python_address()

_FAST = {
    "torch": _Generator(_read_torch, _read_torch, _tensor, _restore_torch),
    "cuda": _Generator(_read_cuda, _read_cuda, _tensor, _restore_cuda),
    "python": _Generator(_read_python, _read_python, _pack_python, _restore_python),
}
_SLOW = {"numpy": _Generator(_read_numpy, _mark_numpy, _pack_numpy, _restore_numpy)}


def _fast(device: torch.device) -> dict[str, _Generator]:
    return {name: generator for name, generator in _FAST.items() if name != "cuda" or device.type == "cuda"}


class RandomWatch:
    """Notes which global generators each of many steps draws from, and their states before it.

    Args:
        device: the device that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._fast, self._slow = list(_fast(device).items()), list(_SLOW.items())
        self._states: dict[str, Any] = {}
        self._marks: dict[str, Any] = {}
        self._exact_left = _EXACT_STEPS
        self._drawing = False  # whether a step has drawn from NumPy: then all further steps are exact

    def before(self, exact: bool = False) -> None:
        """Call this before a step.

        Args:
            exact: whether to read all states, because something may have drawn from them since the last step.
        """
        for name, generator in self._fast:
            self._states[name] = generator.read(self._device)
        self._exact = exact or self._drawing or self._exact_left > 0
        if self._exact:
            self._exact_left -= 1
            for name, generator in self._slow:
                self._states[name] = generator.read(self._device)
                self._marks[name] = generator.mark(self._device)

    def drawn(self) -> dict[str, Tensor]:
        """Call this after a step.

        Returns:
            The states before the step, for :func:`restore_random_states`, of the generators that it has drawn from.
            Perhaps also that of NumPy if something else has drawn from it since the step before.
        """
        found = {}
        for name, generator in self._fast:
            if generator.mark(self._device) != self._states[name]:
                found[name] = generator.pack(self._states[name])
        for name, generator in self._slow:
            changed = generator.mark(self._device) != self._marks[name]
            if changed or (self._exact and generator.read(self._device) != self._states[name]):
                found[name] = generator.pack(self._states[name])
                self._drawing = True
        return found


def restore_random_states(states: RandomStates, device: torch.device) -> None:
    """Set the generators to recorded states.

    Args:
        states: the result of :meth:`RandomWatch.drawn`. A state of CUDA is left out on another device, whose generator
            is a different one.
        device: the device that computes.
    """
    generators = _fast(device) | _SLOW if states else {}
    for name, state in states.items():
        if name in generators:
            generators[name].restore(state, device)
