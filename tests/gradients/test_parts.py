"""How many examples are worked on at a time."""

import pytest

from lightning_trak.gradients.hooks.parts import examples_at_once


@pytest.mark.parametrize(
    ("available", "needed", "expected"),
    [(100, 100, 1), (99, 100, 1), (0, 5, 1), (199, 100, 1), (200, 100, 2), (799, 100, 4), (800, 100, 8), (5, 0, 4)],
)
def test_a_power_of_two_fits(available, needed, expected):
    assert examples_at_once(available, needed) == expected
