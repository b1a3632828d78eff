"""Keeps the user's random states unchanged."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_trak.compatibility import collect_rng_states, set_rng_states


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
