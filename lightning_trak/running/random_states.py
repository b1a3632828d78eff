"""The user's random states stay as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_trak.compatibility import collect_rng_states, set_rng_states


@contextmanager
def isolated_random_states() -> Iterator[None]:
    """Put the random states of Python, NumPy and PyTorch back at the end, after an error too.

    Lightning's ``isolate_rng`` leaves them changed after an error.
    """
    states = collect_rng_states()
    try:
        yield
    finally:
        set_rng_states(states)
