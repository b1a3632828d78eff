"""Looks at the global random generators, quick enough for each step of a small model.

A look is a function. If it gives the same twice, the generator's state has not changed. If not, the state may have
changed. To ask NumPy and Python for their states takes long, since they make many objects. Both are Mersenne Twisters:
each number that is drawn moves a position on, and after 624 of them, all 624 are made anew. So a look reads the
position and the first few numbers, where they lie in memory, and the second Gaussian number that may wait. Where the
numbers are not found, it asks for the state.
"""

import ctypes
import random
import struct
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Look = Callable[[], Any]

_COUNT = 624
_FIRST = struct.Struct("=16I")  # a few numbers


def _memory(address: int, size: int) -> Any:
    return (ctypes.c_char * size).from_address(address)


def torch_look() -> Look:
    """A look at torch's generator of the CPU, whose state is quickly copied."""
    return lambda: torch.get_rng_state().numpy().tobytes()


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
