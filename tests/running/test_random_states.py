"""Random states are the user's, whatever happens."""

import random
import struct

import numpy as np
import pytest
import torch

from lightning_trak.running import random_states
from lightning_trak.running.random_states import RandomWatch, isolated_random_states, restore_random_states


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


@pytest.mark.parametrize("fails", [False, True])
def test_they_are_as_they_were(fails):
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    expected = draw()
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    try:
        with isolated_random_states():
            draw()
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert draw() == expected


DRAWS = {
    "torch": lambda: float(torch.rand(())),
    "numpy": np.random.rand,
    "python": random.random,
    # a second number waits, and the 624 numbers do not change
    "python, again": lambda: random.gauss(0, 1),
    "numpy, again": np.random.standard_normal,
}


@pytest.mark.parametrize("name", DRAWS)
def test_a_watch_notices_who_draws(name):
    with isolated_random_states():
        random.gauss(0, 1), np.random.standard_normal()  # noqa: NPY002
        watch, cpu = RandomWatch(torch.device("cpu")), torch.device("cpu")
        for _ in range(40):
            watch.before()
            assert watch.drawn() == {}
        watch.before()
        expected = DRAWS[name]()
        states = watch.drawn()
        assert list(states) == [name.partition(",")[0]]
        DRAWS[name]()
        restore_random_states(states, cpu)
        assert DRAWS[name]() == expected


def test_the_state_of_pythons_generator():
    with isolated_random_states():
        random.seed(3)
        for _ in range(700):  # more numbers than the generator makes at once
            before, (_, (*numbers, position), gauss) = random_states.python_state(), random.getstate()
            assert before == (struct.pack("=625I", position, *numbers), gauss)
            random.gauss(0, 1)
            assert random_states.python_state() != before


def test_random_numbers_of_a_gpu_are_refused_on_a_cpu():
    with pytest.raises(ValueError, match=r'random numbers on a GPU.* cpu cannot draw them again; .*accelerator="gpu"'):
        restore_random_states({"cuda": torch.zeros(16, dtype=torch.uint8)}, torch.device("cpu"))
