"""Looks at random generators: they find the numbers in memory, and notice each draw."""

import random

import numpy as np
import pytest
import torch

from lightning_trak.running.generator_memory import numpy_look, python_look, torch_look
from lightning_trak.running.random_states import isolated_random_states

DRAWS = {
    "torch": (torch_look, [lambda: torch.rand(()), lambda: torch.randn(1), lambda: torch.randn(1).double()]),
    "numpy": (numpy_look, [np.random.rand, np.random.standard_normal]),
    "python": (python_look, [random.random, lambda: random.gauss(0, 1), lambda: random.getrandbits(5)]),
}


@pytest.fixture(autouse=True)
def _isolated():
    with isolated_random_states():
        yield


@pytest.mark.parametrize("name", DRAWS)
def test_a_look_notices_each_draw_and_nothing_else(name):
    make, draws = DRAWS[name]
    look, seen = make(), []
    for number in range(1400):  # more numbers than a generator makes at once
        seen.append(look())
        assert look() == seen[-1]
        draws[number % len(draws)]()
        assert look() not in seen[-3:]


def test_a_look_notices_a_seed():
    torch.manual_seed(3), np.random.seed(3), random.seed(3)  # noqa: NPY002
    looks = torch_look(), numpy_look(), python_look()
    before = [look() for look in looks]
    torch.manual_seed(4), np.random.seed(4), random.seed(4)  # noqa: NPY002
    assert all(look() != earlier for look, earlier in zip(looks, before, strict=True))


def test_the_numbers_are_found_in_memory():
    assert all(len(look()) == 2 for look in (numpy_look(), python_look()))  # a state of Python has three parts
