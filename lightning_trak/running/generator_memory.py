"""Looks at the global random generators, quick enough for each step of a small model.

A look is a function. If it gives the same twice, the generator's state has not changed. If not, the state may have
changed. ``get_state`` of torch, NumPy and Python tells more, but it takes long, since it makes a copy or many objects.

All three are Mersenne Twisters. Each number that is drawn moves a position on, and after 624 of them, all 624 are made
anew. So a look reads the position and the first few numbers, where they lie in memory. It also reads the second
Gaussian number that may wait. Where the numbers are not found, it asks for the state.
"""

import ctypes
import functools
import random
import struct
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lightning_trak.compatibility import address_of_generator

Look = Callable[[], Any]

_COUNT = 624
_FIRST = struct.Struct("=16I")  # a few numbers
_HEAD = 512  # bytes of a generator of torch among which the numbers begin. They alone take more.
_FIRST_IN_STATE = slice(24, 24 + 16 * 8)  # the few numbers, as int64
_BEFORE, _BEHIND = 20, 28  # bytes around all numbers: seed and position; Gaussian numbers that wait


def _memory(address: int, size: int) -> Any:
    return (ctypes.c_char * size).from_address(address)


def torch_look() -> Look:
    """A look at torch's generator of the CPU."""
    return _torch_look(torch.default_generator, _torch_start())


def _torch_look(generator: torch.Generator, start: int | None) -> Look:
    if start is None:
        return lambda: generator.get_state().numpy().tobytes()
    numbers = address_of_generator(generator) + start
    first, last = _memory(numbers - _BEFORE, _BEFORE + _FIRST.size), _memory(numbers + 4 * _COUNT, _BEHIND)
    return lambda: (first.raw, last.raw)


@functools.cache
def _torch_start() -> int | None:
    """Where a generator of torch has its numbers, in bytes from its address. Tried with a generator of its own.

    Returns:
        None if they are not found, or if a look misses a number that is drawn.
    """
    generator = torch.Generator()
    first = generator.get_state()[_FIRST_IN_STATE].view(torch.int64).tolist()
    start = ctypes.string_at(address_of_generator(generator), _HEAD).find(_FIRST.pack(*first))
    if start < _BEFORE:
        return None
    look = _torch_look(generator, start)
    for dtype in (torch.float32, torch.float64):
        for draw in (torch.rand, torch.randn, torch.randn):  # the last takes the Gaussian number that waits
            before = look()
            draw(1, generator=generator, dtype=dtype)
            if look() == before:
                return None
    return start


def numpy_look() -> Look:
    """A look at ``numpy.random``.

    Raises:
        ValueError: by the look, if the generator is not a Mersenne Twister.
    """
    generator: Any = None
    first: Any = None
    position: Any = None
    last: Any = None
    gauss: float | None = None

    def look() -> Any:
        nonlocal generator, first, position, last, gauss
        current: Any = np.random.get_bit_generator()  # type: ignore[attr-defined]
        if current is not generator:
            if not isinstance(current, np.random.MT19937):
                raise ValueError(
                    f"numpy.random draws from {type(current).__name__}, whose state is not recorded; leave it at"
                    " MT19937"
                )
            numbers = current.ctypes.state_address
            generator, first, position = current, _memory(numbers, _FIRST.size), _memory(numbers + 4 * _COUNT, 4)
        found = first.raw, position.raw
        # The Gaussian number is elsewhere. None waits if none did and nothing was drawn, since they come in pairs.
        if gauss is not None or found != last:
            state: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002
            last, gauss = found, state["gauss"] if state["has_gauss"] else None
        return found, gauss

    return look


def cuda_look(device: torch.device) -> Look:
    """A look at the generator of a GPU."""
    return lambda: torch.cuda.get_rng_state(device).numpy().tobytes()


def python_look() -> Look:
    """A look at Python's ``random``."""
    generator: Any = random.getstate.__self__  # type: ignore[attr-defined]
    large_enough = type(generator).__basicsize__ >= object.__basicsize__ + 4 * (1 + _COUNT)
    if sys.implementation.name == "cpython" and large_enough:
        # CPython has the position and the numbers behind the object's head.
        memory = _memory(id(generator) + object.__basicsize__, 4 + _FIRST.size)
        _, numbers, _ = random.getstate()
        if memory.raw == struct.pack("=17I", numbers[-1], *numbers[:16]):
            return lambda: (memory.raw, generator.gauss_next)
    return random.getstate
