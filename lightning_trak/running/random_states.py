"""Random states: kept unchanged for the user, and recorded before a training step."""

import random
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_trak.compatibility import collect_rng_states, set_rng_states
from lightning_trak.running.generator_memory import Look, cuda_look, numpy_look, python_look, torch_look

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
    """A global generator.

    Attributes:
        make_look: makes a look at it, see :mod:`~lightning_trak.running.generator_memory`.
        read: its state as bytes.
        restore: set it to such bytes.
    """

    make_look: Callable[[], Look]
    read: Callable[[], Tensor]
    restore: Callable[[Tensor], None]


def _read_numpy() -> Tensor:
    state: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002
    own = state["state"]
    return _tensor(_NUMPY.pack(own["pos"], state["has_gauss"], state["gauss"]) + own["key"].astype("<u4").tobytes())


def _restore_numpy(packed: Tensor) -> None:
    content = packed.numpy().tobytes()
    position, has_gauss, gauss = _NUMPY.unpack_from(content)
    key = np.frombuffer(content, "<u4", offset=_NUMPY.size).astype(np.uint32)
    np.random.set_state(("MT19937", key, position, has_gauss, gauss))  # noqa: NPY002


def _read_python() -> Tensor:
    version, numbers, gauss = random.getstate()
    return _tensor(_PYTHON.pack(version, *numbers, gauss is not None, gauss or 0.0))


def _restore_python(packed: Tensor) -> None:
    version, *numbers, has_gauss, gauss = _PYTHON.unpack(packed.numpy().tobytes())
    random.setstate((version, tuple(numbers), gauss if has_gauss else None))


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _generators(device: torch.device) -> dict[str, _Generator]:
    """The generators that computations on a device draw from, by name."""
    found = {
        "torch": _Generator(torch_look, torch.get_rng_state, torch.set_rng_state),
        "numpy": _Generator(numpy_look, _read_numpy, _restore_numpy),
        "python": _Generator(python_look, _read_python, _restore_python),
    }
    if device.type == "cuda":
        found["cuda"] = _Generator(
            partial(cuda_look, device),
            partial(torch.cuda.get_rng_state, device),
            partial(torch.cuda.set_rng_state, device=device),
        )
    return found


class RandomWatch:
    """Notes which global generators each of many steps draws from, and their states before it.

    A step that draws nothing costs two looks at each generator: a state is read only after its look has changed.

    Args:
        device: the device that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._generators = _generators(device)
        self._looks = [generator.make_look() for generator in self._generators.values()]
        self._seen = [look() for look in self._looks]
        self._states = {name: generator.read() for name, generator in self._generators.items()}

    def before(self) -> None:
        """Call this before a step, so that what others have drawn is not taken for its draws."""
        self.drawn()

    def drawn(self) -> dict[str, Tensor]:
        """Call this after a step.

        Returns:
            The states before the step, for :func:`restore_random_states`, of the generators that it has drawn from.
        """
        seen = [look() for look in self._looks]
        if seen == self._seen:
            return {}
        found = {}
        for (name, generator), new, old in zip(self._generators.items(), seen, self._seen, strict=True):
            if new != old:
                before, after = self._states[name], generator.read()
                if not torch.equal(before, after):
                    found[name], self._states[name] = before, after
        self._seen = seen
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
        generators[name].restore(state)
